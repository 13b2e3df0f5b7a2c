"""A target of which only the likeliest tokens are stored, and what these say about acceptance."""

from distill.chunked import projected_loss
from distill.laws import TopLaw
from distill.objectives import ForwardKL


class Stored:
    """The k likeliest tokens of a target's law."""

    def __init__(self, target, k):
        self.target, self.k = target, k

    def law(self, rows):
        logprobs, ids = self.target.law(rows).logits.log_softmax(-1).topk(self.k)
        return TopLaw(ids, logprobs, 1 - logprobs.exp().sum(-1))


def check_bounds(aligned, target):
    """The rates at each depth and the accepted length lie between their bounds, which narrow."""
    exact = projected_loss(aligned, target, ForwardKL()).metrics
    depths = range(1, len(aligned.depths) + 1)
    suffixes = [f"_{depth}" for depth in depths] if len(depths) > 1 else [""]
    bounded = [f"alpha{suffix}" for suffix in suffixes]
    bounded += ["accepted_length"] * (len(depths) > 1)
    widths = []
    for k in (1, 3, 5):
        metrics = projected_loss(aligned, Stored(target, k), ForwardKL()).metrics
        pairs = [(metrics[f"{name}_lower"], metrics[f"{name}_upper"]) for name in bounded]
        for name, (lower, upper) in zip(bounded, pairs, strict=True):
            assert lower[0] < exact[name][0] < upper[0], name
            assert lower[1] == exact[name][1] == upper[1], name
        for suffix in suffixes:
            known, greedy = metrics[f"greedy_alpha{suffix}_lower"], exact[f"greedy_alpha{suffix}"]
            assert known[0] <= greedy[0]
        widths.append([float(upper[0] - lower[0]) for lower, upper in pairs])
    for of_one in zip(*widths, strict=True):
        assert list(of_one) == sorted(of_one, reverse=True)
