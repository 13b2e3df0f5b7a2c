"""All that `draftsmith train` lets one choose: trained by config alone, drafting elsewhere.

Each choice is trained for a few steps, as from the command line, and saved; a process that trained
nothing loads the folder and drafts chains and trees for several prompts at once. Its greedy output
must be transformers' own.
"""

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from distill import config
from distill.generate import Generate
from distill.prompts import DatasetPrompts
from distill.runs import Run, at_last_step
from distill.target import TargetSettings
from distill.train import SamplingParams, Train
from tests.distill.tiny import llama, save_target

CONF = Path(config.conf_dir())
PROMPTS = [[3, 4, 5], [9, 8, 7, 6, 5], [11]]
NEW_TOKENS = 20

FAMILIES = {
    "lm": "drafter=lm drafter.num_layers=1 drafter.hidden_size=32",
    "medusa": "drafter=medusa drafter.num_heads=3",
    "hydra": "drafter=hydra drafter.num_heads=3",
    "blockwise": "drafter=blockwise drafter.num_heads=3",
}
OTHER_DRAFTERS = {
    "lm_from_target": "drafter=lm_from_target drafter.num_layers=2",
    "lm_pruned": "drafter=lm_pruned drafter.num_layers=2 drafter.intermediate_size=40",
    "lm_from_checkpoint": "drafter=lm_from_checkpoint drafter.path={lm}",
    "lm_from_checkpoint, lora": "drafter=lm_from_checkpoint drafter.path={lm} lora=all_linear",
    "frequent ids": f"{FAMILIES['lm']} vocabulary=frequent vocabulary.keep=12",
    "hydra++": f"{FAMILIES['hydra']} drafter.num_layers=2 drafter.prefix_attention=true",
    "blockwise, one at a time": f"{FAMILIES['blockwise']} drafter.one_at_a_time=true",
    "blockwise, fine-tuned": f"{FAMILIES['blockwise']} lora=all_linear",
    "medusa-2": "drafter=heads_from_checkpoint drafter.path={medusa} lora=all_linear",
    "medusa-2, adaspec": f"{FAMILIES['medusa']} lora=all_linear objective=adaspec "
    "objective.reference={medusa}",
    "lm, drafts": f"{FAMILIES['lm']} objective.block=3 depth_weights=survival",
}
WRITTEN = "{0}.source.rows={{rows}} {0}.every=2 {0}.num_prompts=5 {0}.sampling.max_new_tokens=6"
DATA = {
    "seq_kd": "data.rows={rows}",
    "text": "data=text prompts@data.prompts=dataset data.prompts.path={texts} "
    "data.prompts.reference_column=reference",
    "on_policy": f"data=on_policy {WRITTEN.format('data')}",
    "mixed_tokens": f"data=mixed_tokens data.top=3 {WRITTEN.format('data')}",
    "in_the_loop": f"data=in_the_loop data.elsewhere=0 {WRITTEN.format('data')}",
    "mixture": "data=mixture data.parts.seq_kd.rows={rows} "
    + WRITTEN.format("data.parts.on_policy"),
    "another mixture": "data=mixture data.parts.seq_kd.rows={rows} data.weights.seq_kd=0.1 "
    "~data@data.parts.on_policy ~data.weights.on_policy "
    "+data@data.parts.mine=mixed_tokens +data.weights.mine=0.2 "
    + WRITTEN.format("data.parts.mine"),
}
WEIGHTS = ("uniform", "decay", "survival")
OBJECTIVES = [path.stem for path in sorted((CONF / "objective").glob("*.yaml"))]


def cases() -> dict[str, str]:
    """What is chosen, by a name."""
    found = {
        f"{family}, {objective}": f"{FAMILIES[family]} objective={objective} {DATA['seq_kd']}"
        + (f" objective.reference={{{family}}}" if objective == "adaspec" else "")
        for family in ("lm", "hydra")
        for objective in OBJECTIVES
    }
    for name, data in DATA.items():
        found[f"lm, {name}"] = f"{FAMILIES['lm']} {data}"
        if name not in ("on_policy", "mixture"):  # heads cannot write alone
            found[f"medusa, {name}"] = f"{FAMILIES['medusa']} {data}"
    heads = f"{FAMILIES['blockwise']} {DATA['seq_kd']}"
    found |= {f"blockwise, {name}": f"{heads} depth_weights={name}" for name in WEIGHTS}
    for family in ("lm", "blockwise"):
        found[f"{family}, stored"] = f"{FAMILIES[family]} teacher=stored {DATA['seq_kd']}"
    return found | {name: f"{more} {DATA['seq_kd']}" for name, more in OTHER_DRAFTERS.items()}


CASES = cases()


def test_every_option_is_among_them() -> None:
    chosen = {argument for one in CASES.values() for argument in one.split()}
    chosen |= {"data=seq_kd", "teacher=live"}  # the defaults
    for group in ("drafter", "objective", "data", "depth_weights", "teacher", "lora", "vocabulary"):
        options = {f"{group}={path.stem}" for path in (CONF / group).glob("*.yaml")}
        assert options <= chosen


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Whose outputs have a few tokens often: a few steps teach a drafter something."""
    model = llama(spread=0.4)
    with torch.no_grad():
        model.lm_head.weight[3:8] *= 3
    return save_target(tmp_path_factory.mktemp("target"), model)


Trained = Callable[[str], Path]
Drafted = Callable[[Path, Path], tuple[list[list[list[int]]], list[int]]]


@pytest.fixture(scope="module")
def trained(target: Path, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    """From what is chosen to the finished drafter's folder; each choice is trained once."""
    folder = tmp_path_factory.mktemp("trained")
    texts = folder / "texts.jsonl"
    rows = [{"prompt": f"t{n} t6 t7", "reference": f"t{n + 1} t5 t9"} for n in range(3, 20)]
    texts.write_text("".join(json.dumps(row) + "\n" for row in rows))
    generate = Generate(
        target=TargetSettings(path=str(target)),
        prompts=DatasetPrompts(path=str(texts)),
        sampling=SamplingParams(max_new_tokens=8, ignore_eos=True, top_logprobs=4),
        output=folder / "rows",
    )
    given = {"rows": str(generate.run()), "texts": str(texts)}
    common = (
        f"target=hf target.path={target} prompts=dataset prompts.path={texts} num_held_out=2 "
        "sampling.max_new_tokens=8 draft_length=2 trainer.steps=4 trainer.batch_size=2 "
        "trainer.micro_batch_size=2 trainer.sequence_length=24 trainer.evaluate_every=4 "
        "trainer.learning_rate=0.02 trainer.warmup_steps=0"
    )
    done: dict[str, Path] = {}

    def train(chosen: str) -> Path:
        if chosen not in done:
            before = [name for name in FAMILIES if f"{{{name}}}" in chosen]
            needed = {name: str(train(f"{FAMILIES[name]} {DATA['seq_kd']}")) for name in before}
            output = folder / str(len(done))
            arguments = f"{common} {chosen} output={output}".format(**given, **needed)
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(sys, "argv", ["draftsmith", *arguments.split()])
                config.command("train", Train)()
            if ".every=2" in chosen:  # data that are written while training
                written = {path.stem.split("-")[-1] for path in (output / "written").iterdir()}
                assert written == {"00000000", "00000002"}
            run = Run(output)
            if "lora=" not in chosen:  # those of the best step may be those of none
                run = at_last_step(run, output / "last")
            done[chosen] = run.drafter
        return done[chosen]

    return train


ELSEWHERE = f"""
import json, sys
from transformers import AutoModelForCausalLM, AutoTokenizer
from decode import Request, SamplingParams, SpeculativeDecoder, Target
from decode.drafters import Chains, ExpansionTrees, load_drafter

sampling = SamplingParams(max_new_tokens={NEW_TOKENS})
requests = [Request(id=str(n), prompt=ids, sampling=sampling) for n, ids in enumerate({PROMPTS})]
for line in sys.stdin:
    folder, drafter = json.loads(line)
    target = Target(AutoModelForCausalLM.from_pretrained(folder), max_batch_size=2)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    outputs, num_accepted = [], []
    for draft in (Chains(length=3), ExpansionTrees(counts=(2, 2, 1))):
        loaded = load_drafter(drafter, target=target, draft=draft, tokenizer=tokenizer)
        results = SpeculativeDecoder(target, loaded).generate(requests)
        outputs.append([result.tokens for result in results])
        num_accepted.append(sum(result.stats.num_accepted_tokens for result in results))
    print(json.dumps([outputs, num_accepted]), flush=True)
"""


@pytest.fixture(scope="module")
def drafted() -> Iterator[Drafted]:
    """From the folders of target and drafter to outputs, and how much was accepted for them.

    By a process that trained neither; chains first, then trees.
    """
    process = subprocess.Popen(
        [sys.executable, "-c", ELSEWHERE], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )

    def ask(target: Path, drafter: Path) -> tuple[list[list[list[int]]], list[int]]:
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write(json.dumps([str(target), str(drafter)]) + "\n")
        process.stdin.flush()
        outputs, num_accepted = json.loads(process.stdout.readline())
        return outputs, num_accepted

    yield ask
    process.communicate()


@pytest.mark.parametrize("chosen", CASES.values(), ids=CASES)
def test_a_choice_is_trained_by_config_alone_and_drafts_elsewhere(
    target: Path,
    trained: Trained,
    drafted: Drafted,
    greedy: Callable[..., list[int]],
    chosen: str,
) -> None:
    drafter = trained(chosen)
    own = drafter / "target"  # of heads that were trained together with it
    assert own.exists() == ("lora=" in chosen and "lm_from" not in chosen)
    model_folder = own if own.exists() else target
    model = AutoModelForCausalLM.from_pretrained(model_folder)
    expected = [greedy(model, prompt, NEW_TOKENS) for prompt in PROMPTS]
    outputs, num_accepted = drafted(model_folder, drafter)
    assert outputs == [expected, expected]
    assert num_accepted[1] > 0, "a few steps on these outputs teach every drafter something"
