"""Time the suffix index by replaying recorded outputs: no model, one thread, one run.

    python scripts/bench_suffix.py
    python scripts/bench_suffix.py --train past.npy --streams new.npy --json bench.json
    python scripts/bench_suffix.py --train past.jsonl --streams new.jsonl --tokenizer FOLDER

Files are .npy (flat 32-bit ids, documents end with --separator), .txt (one document) or .jsonl (the
column --column of each row), the last two through --tokenizer. Without files the past is the
standard library (and installed packages, if more tokens are asked for) and two streams are
replayed against it: `unseen`, modules that are not in it, and `edited`, modules that are, 3 % of
their tokens replaced at random.

An output is replayed as greedy decoding would emit it: a draft is accepted as far as the recorded
text goes with it. Every implementation runs in processes of its own, interleaved; arctic-inference
takes part where it is installed (it needs not be), prompt lookup drafts for comparison. Memory is
what the resident set grows by, imports and compilation not counted. `--json FILE` writes

    bytes_per_token_live           ours, at the larger depth
    bytes_per_token_frozen         ours, the file
    build_tokens_per_s             ours in bulk, the slower depth; live_tokens_per_s by the API
    lookup_p50_over_arctic         ours / theirs, the worst of all streams and settings; also p99
    update_over_arctic             likewise, the mean time of an update
    tokens_per_step_over_arctic    the worst likewise
    longest_call_ms                of a cache with a budget while old tokens leave
"""

import argparse
import json
import os
import random
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

os.environ.setdefault("ARCTIC_INFERENCE_ENABLED", "0")  # its patches of vLLM are not wanted

Documents = list[NDArray[np.int32]]
PROMPT, OUTPUT = 256, 1024  # tokens of a replayed document, at most
AT_ONCE = 8  # tokens by which an output grows where pauses are looked for
DEFAULT_TOKENIZER = Path(__file__).parents[1] / "distill" / "embedded_target"
SEED = 0


def read_documents(path: Path, args: argparse.Namespace) -> Documents:
    """The documents of a file."""
    if path.suffix == ".npy":
        tokens = np.load(path).astype(np.int32)
        ends = np.append(np.flatnonzero(tokens == args.separator), len(tokens))
        starts = np.append(0, ends[:-1] + 1)
        return [tokens[a:b].copy() for a, b in zip(starts, ends, strict=True) if b > a]
    if path.suffix == ".jsonl":
        with path.open(encoding="utf-8") as lines:
            texts = [json.loads(line)[args.column] for line in lines]
    else:
        texts = [path.read_text(encoding="utf-8")]
    return encode(texts, args.tokenizer)


def encode(texts: list[str], tokenizer: Path) -> Documents:
    """Texts as token ids."""
    from tokenizers import Tokenizer

    core = Tokenizer.from_file(str(tokenizer / "tokenizer.json"))
    encoded = (core.encode_batch_fast(texts[at : at + 64]) for at in range(0, len(texts), 64))
    return [np.array(one.ids, dtype=np.int32) for batch in encoded for one in batch]


def installed_sources() -> Iterator[str]:
    """Python files of the standard library in random order, then of installed packages."""
    roots = [Path(sysconfig.get_path("stdlib")), Path(sysconfig.get_path("purelib"))]
    for number, root in enumerate(roots):
        files = [p for p in root.rglob("*.py") if number or roots[1] not in p.parents]
        files = sorted(p for p in files if 500 < p.stat().st_size < 400_000)
        random.Random(SEED).shuffle(files)
        for path in files:
            yield path.read_text(encoding="utf-8", errors="replace")


def default_data(num_tokens: int, tokenizer: Path) -> tuple[Documents, dict[str, Documents]]:
    """The past, of so many tokens, and the two streams."""
    sources = installed_sources()
    unseen = encode([next(sources) for _ in range(40)], tokenizer)
    past: Documents = []
    total = 0
    while total < num_tokens:
        texts = [text for _, text in zip(range(64), sources, strict=False)]
        if not texts:
            print(f"installed packages have {total} tokens only", file=sys.stderr)
            break
        for document in encode(texts, tokenizer):
            if total < num_tokens:
                past.append(document)
                total += len(document)
    rng = np.random.default_rng(SEED)
    edited = []
    for document in [d for d in past if len(d) > 600][:40]:
        changed = document.copy()
        where = rng.random(len(changed)) < 0.03
        changed[where] = rng.integers(300, int(max(d.max() for d in past)), where.sum())
        edited.append(changed)
    return past, {"unseen": unseen, "edited": edited}


def save(path: Path, documents: Documents) -> None:
    """Documents for the processes that measure."""
    np.savez(path, lengths=[len(d) for d in documents], tokens=np.concatenate(documents))


def load(path: str) -> Documents:
    """What `save` wrote."""
    with np.load(path) as stored:
        return np.split(stored["tokens"], np.cumsum(stored["lengths"])[:-1])


def cache_class(name: str) -> Any:
    """The cache of an implementation."""
    if name == "arctic":
        from arctic_inference.suffix_decoding import (  # type: ignore[import-not-found]
            SuffixDecodingCache,
        )

        return SuffixDecodingCache
    from decode.suffix import SuffixDecodingCache as Ours

    return Ours


def resident() -> int:
    """Bytes of memory this process holds."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def warmed_up(name: str) -> Any:
    """A class whose code is loaded and compiled."""
    cls = cache_class(name)
    replay(cls(16), [np.arange(100, dtype=np.int32) % 7], 16, tree=True, factor=1.0)
    return cls


def build(job: dict[str, Any]) -> dict[str, Any]:
    """Fill a cache: by the API a document at a time, or ours in bulk and to disk."""
    past = load(job["past"])
    cls = warmed_up(job["name"])
    total = sum(map(len, past))
    before = resident()
    started = time.perf_counter()
    cache = cls(max_tree_depth=job["depth"])
    if job["mode"] == "api":
        add(cache, past)
    else:
        for document in past:
            cache.add_output(document)
    seconds = time.perf_counter() - started
    found = {"tokens_per_s": total / seconds, "bytes_per_token": (resident() - before) / total}
    if job["mode"] == "bulk":
        cache.save(job["index"])  # compiles what writes
        started = time.perf_counter()
        cache.save(job["index"])
        found["save_s"] = time.perf_counter() - started
        started = time.perf_counter()
        cls.open(job["index"])
        found["open_s"] = time.perf_counter() - started
        found["frozen_bytes_per_token"] = os.path.getsize(job["index"]) / total
    return found


def add(cache: Any, past: Documents) -> None:
    """Every document as the output of a request."""
    nothing = np.zeros(0, dtype=np.int32)
    for number, document in enumerate(past):
        cache.start_request(number, nothing)
        cache.add_active_response(number, document)
        cache.stop_request(number)


def replay(
    cache: Any, documents: Documents, depth: int, *, tree: bool, factor: float
) -> dict[str, float]:
    """Drafts and updates along recorded outputs, each taken out again behind its end."""
    clock = time.perf_counter_ns
    lookups, updates, drafted, accepted = [], [], 0, 0
    for number, document in enumerate(documents):
        document = document[: PROMPT + OUTPUT]
        tokens = document.tolist()
        key = f"replayed {number}"
        position = min(PROMPT, len(tokens) // 4)
        cache.start_request(key, document[:position])
        while position < len(tokens):
            context = document[max(0, position - depth) : position]
            begun = clock()
            draft = cache.speculate(
                key,
                context,
                max_spec_tokens=32,
                max_spec_factor=factor,
                min_token_prob=0.1,
                use_tree_spec=tree,
            )
            lookups.append(clock() - begun)
            drafted += len(draft.token_ids)
            below = {
                (parent, token): node
                for node, (parent, token) in enumerate(
                    zip(draft.parents, draft.token_ids, strict=True)
                )
            }
            node, end = -1, position
            while end < len(tokens) and (node, tokens[end]) in below:
                node = below[node, tokens[end]]
                end += 1
            accepted += end - position
            emitted = document[position : end + 1]
            begun = clock()
            cache.add_active_response(key, emitted)
            updates.append(clock() - begun)
            position += len(emitted)
        cache.stop_request(key)
        if hasattr(cache, "evict_cached_response"):
            cache.evict_cached_response(key)
    steps = len(lookups)
    return {
        "steps": steps,
        "drafted": drafted / steps,
        "accepted": accepted / steps,
        "tokens_per_step": 1 + accepted / steps,
        "lookup_p50": float(np.percentile(lookups, 50)) / 1e3,
        "lookup_p99": float(np.percentile(lookups, 99)) / 1e3,
        "update_mean": float(np.mean(updates)) / 1e3,
        "update_p99": float(np.percentile(updates, 99)) / 1e3,
    }


class PromptLookup:
    """Prompt lookup behind the same calls."""

    def __init__(self) -> None:
        from decode.drafters import PromptLookupDrafter

        self.drafter = PromptLookupDrafter()
        self.texts: dict[str, NDArray[np.int64]] = {}

    def start_request(self, key: str, tokens: NDArray[np.int32]) -> None:
        """Begin."""
        self.texts[key] = tokens.astype(np.int64)

    def add_active_response(self, key: str, tokens: NDArray[np.int32]) -> None:
        """Go on."""
        self.texts[key] = np.concatenate([self.texts[key], tokens])

    def stop_request(self, key: str) -> None:
        """Forget."""
        del self.texts[key]

    def speculate(self, key: str, context: NDArray[np.int32], **_: Any) -> Any:
        """Copy."""
        from decode.suffix import SuffixDraft

        copied = self.drafter.copy(self.texts[key]).tolist()
        return SuffixDraft(copied, list(range(-1, len(copied) - 1)))


def replays(job: dict[str, Any]) -> list[dict[str, Any]]:
    """All streams and settings on one cache."""
    if job["name"] == "prompt lookup":
        cache: Any = PromptLookup()
    elif job["name"] == "ours frozen":
        warmed_up("ours")
        cache = cache_class("ours").open(job["index"])
    else:
        cache = warmed_up(job["name"])(max_tree_depth=job["depth"])
        add(cache, load(job["past"]))
    found = []
    for stream, path in job["streams"].items():
        documents = load(path)
        for factor in job["factors"]:
            for tree in (False, True) if job["name"] != "prompt lookup" else (False,):
                row = replay(cache, documents, job["depth"], tree=tree, factor=factor)
                found.append({"stream": stream, "tree": tree, "factor": factor, **row})
    return found


def growth(job: dict[str, Any]) -> list[dict[str, float]]:
    """Look-up time as the past grows."""
    past, unseen = load(job["past"]), load(job["streams"]["unseen"])[:10]
    cache = warmed_up("ours")(max_tree_depth=job["depth"])
    found: list[dict[str, float]] = []
    waiting, total = iter(past), 0
    for goal in job["sizes"]:
        while total < goal:
            document = next(waiting, None)
            if document is None:
                return found
            cache.add_output(document)
            total += len(document)
        row = replay(cache, unseen, job["depth"], tree=False, factor=1.0)
        found.append({"tokens": total, **row})
    return found


def pauses(job: dict[str, Any]) -> dict[str, float]:
    """Milliseconds of calls by which outputs grow, while as many old tokens leave.

    The budget is half of the past; outputs grow by a few tokens at a time, and calls count from
    where the budget is used up.
    """
    past = load(job["past"])
    budget = sum(map(len, past)) // 2
    warmed_up("ours")
    cache = cache_class("ours")(job["depth"], max_cached_tokens=budget)
    nothing = np.zeros(0, dtype=np.int32)
    taken, total = [], 0
    for number, document in enumerate(past):
        calls: list[tuple[Any, tuple[Any, ...]]] = [(cache.start_request, (number, nothing))]
        for begin in range(0, len(document), AT_ONCE):
            piece = document[begin : begin + AT_ONCE]
            calls.append((cache.add_active_response, (number, piece)))
        calls.append((cache.stop_request, (number,)))
        for call, arguments in calls:
            started = time.perf_counter()
            call(*arguments)
            if total > budget:
                taken.append(1e3 * (time.perf_counter() - started))
        total += len(document)
    median, high = np.quantile(taken, [0.5, 0.999])
    return {"calls": len(taken), "median": median, "p99.9": high, "longest": max(taken)}


JOBS = {"build": build, "replays": replays, "growth": growth, "pauses": pauses}


def measure(job: dict[str, Any]) -> Any:
    """Run a job in a process of its own, on one core."""
    command = [sys.executable, __file__, "--job", json.dumps(job)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{job['kind']} of {job['name']} failed:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def has_arctic() -> bool:
    """Whether the reference can be imported."""
    return not subprocess.run(
        [sys.executable, "-c", "from arctic_inference.suffix_decoding import SuffixDecodingCache"],
        capture_output=True,
        check=False,
    ).returncode


def plot_growth(rows: list[dict[str, float]], path: Path) -> None:
    """Median and 99th percentile over the size of the past."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 3.5), layout="constrained")
    axes = figure.subplots()
    sizes = [row["tokens"] for row in rows]
    axes.plot(sizes, [row["lookup_p50"] for row in rows], marker="o", label="median")
    axes.plot(sizes, [row["lookup_p99"] for row in rows], marker="o", label="99th percentile")
    axes.set(xscale="log", ylim=(0, None), xlabel="tokens of past outputs", ylabel="look-up, µs")
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)


def parsed() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--train", type=Path, nargs="*", default=[], help="past outputs")
    parser.add_argument("--streams", type=Path, nargs="*", default=[], help="outputs to replay")
    parser.add_argument("--tokens", type=int, default=4_000_000, help="of the past, at most")
    parser.add_argument("--tokenizer", type=Path, default=DEFAULT_TOKENIZER)
    parser.add_argument("--column", default="text")
    parser.add_argument("--separator", type=int, default=1)
    parser.add_argument("--depths", type=int, nargs="+", default=[64, 24])
    parser.add_argument("--factors", type=float, nargs="+", default=[1.0])
    parser.add_argument("--without-arctic", action="store_true")
    parser.add_argument("--growth", type=Path, help="plot look-up time over size to this file")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--job", help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    """Measure, print the tables, write the figures."""
    args = parsed()
    if args.job:
        job = json.loads(args.job)
        print(json.dumps(JOBS[job["kind"]](job)))
        return
    if bool(args.train) != bool(args.streams):
        raise SystemExit("give --train and --streams, or neither")
    with tempfile.TemporaryDirectory() as folder:
        run(args, Path(folder))


def run(args: argparse.Namespace, folder: Path) -> None:
    """All of it; `folder` takes the data."""
    if args.train:
        past = [document for path in args.train for document in read_documents(path, args)]
        ends = np.cumsum([len(document) for document in past])
        past = past[: int(np.searchsorted(ends, args.tokens)) + 1]
        streams = {path.stem: read_documents(path, args) for path in args.streams}
    else:
        past, streams = default_data(args.tokens, args.tokenizer)
    save(folder / "past.npz", past)
    for stream, documents in streams.items():
        save(folder / f"{stream}.npz", documents)
    base: dict[str, Any] = {
        "past": str(folder / "past.npz"),
        "streams": {stream: str(folder / f"{stream}.npz") for stream in streams},
        "index": str(folder / "index"),
        "factors": args.factors,
    }
    peers = ["arctic"] if has_arctic() and not args.without_arctic else []
    total = sum(map(len, past))
    print(f"past: {total:,} tokens in {len(past)} documents; drafts of up to 32 tokens\n")
    print("| cache | depth | filled | tokens/s | bytes per token | frozen | save s | open s |")
    print("| --- " * 8 + "|")
    built: dict[tuple[str, int, str], dict[str, Any]] = {}
    looked_up: dict[tuple[str, int], list[dict[str, Any]]] = {}
    for depth in args.depths:
        kinds = [("ours", "bulk"), ("ours", "api"), *((peer, "api") for peer in peers)]
        for name, mode in kinds:
            job = {**base, "kind": "build", "name": name, "depth": depth, "mode": mode}
            row = built[name, depth, mode] = measure(job)
            optional = [
                f"{row[key]:.2f}" if key in row else "-"
                for key in ("frozen_bytes_per_token", "save_s", "open_s")
            ]
            print(
                f"| {name} | {depth} | {mode} | {row['tokens_per_s']:,.0f} | "
                f"{row['bytes_per_token']:.1f} | {' | '.join(optional)} |",
                flush=True,
            )
        for name in ["ours", "ours frozen", *peers]:  # the index is of this depth
            job = {**base, "kind": "replays", "name": name, "depth": depth}
            looked_up[name, depth] = measure(job)
    job = {**base, "kind": "replays", "name": "prompt lookup", "depth": 0}
    looked_up["prompt lookup", 0] = measure(job)
    print(
        "\n| cache | depth | stream | drafts | factor | drafted | tokens/step | "
        "look-up p50 µs | p99 | update mean µs | p99 |\n" + "| --- " * 11 + "|"
    )
    for (name, depth), rows in looked_up.items():
        for row in rows:
            print(
                f"| {name} | {depth or '-'} | {row['stream']} | "
                f"{'tree' if row['tree'] else 'chain'} | {row['factor']:g} | "
                f"{row['drafted']:.2f} | {row['tokens_per_step']:.3f} | "
                f"{row['lookup_p50']:.1f} | {row['lookup_p99']:.1f} | "
                f"{row['update_mean']:.1f} | {row['update_p99']:.1f} |"
            )
    figures = summary(built, looked_up, args.depths)
    held = measure({**base, "kind": "pauses", "name": "ours", "depth": max(args.depths)})
    print(
        f"\nhalf of the past as a budget, old tokens leave as new ones come: {held['calls']:,} "
        f"calls, median {1e3 * held['median']:.1f} µs, 99.9 % under {held['p99.9']:.2f} ms, "
        f"longest {held['longest']:.2f} ms"
    )
    figures["longest_call_ms"] = held["longest"]
    if args.growth:
        sizes = [size for size in np.geomspace(1e4, 1e7, 13).astype(int).tolist() if size <= total]
        job = {**base, "kind": "growth", "name": "ours", "depth": max(args.depths)}
        figures["growth"] = measure({**job, "sizes": sizes})
        plot_growth(figures["growth"], args.growth)
    print("\n" + "\n".join(f"{k}: {v:.3f}" for k, v in figures.items() if isinstance(v, float)))
    if args.json:
        args.json.write_text(json.dumps(figures, indent=2) + "\n")


def summary(
    built: dict[tuple[str, int, str], dict[str, Any]],
    looked_up: dict[tuple[str, int], list[dict[str, Any]]],
    depths: list[int],
) -> dict[str, Any]:
    """The keys of --json; ratios are the worst of all rows."""
    bulk = [built["ours", depth, "bulk"] for depth in depths]
    figures: dict[str, Any] = {
        "bytes_per_token_live": max(built["ours", d, "api"]["bytes_per_token"] for d in depths),
        "bytes_per_token_frozen": max(row["frozen_bytes_per_token"] for row in bulk),
        "build_tokens_per_s": min(row["tokens_per_s"] for row in bulk),
        "live_tokens_per_s": min(built["ours", d, "api"]["tokens_per_s"] for d in depths),
    }
    pairs = [
        (ours, theirs)
        for depth in depths
        for ours, theirs in zip(
            looked_up["ours", depth], looked_up.get(("arctic", depth), []), strict=False
        )
    ]
    if pairs:
        for key, column in (
            ("lookup_p50_over_arctic", "lookup_p50"),
            ("lookup_p99_over_arctic", "lookup_p99"),
            ("update_over_arctic", "update_mean"),
        ):
            figures[key] = max(ours[column] / theirs[column] for ours, theirs in pairs)
        figures["tokens_per_step_over_arctic"] = min(
            ours["tokens_per_step"] / theirs["tokens_per_step"] for ours, theirs in pairs
        )
    return figures


if __name__ == "__main__":
    main()
