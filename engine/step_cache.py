"""Reuse of what hardly changes between the steps of a sample: a first-block cache.

        step with     | first block | -> is its change about that of the last full step?
                             |
                             no   run all other blocks; keep their change        out - first
                             yes  leave them out, add the change that was kept   first + (out - first)

Neighbouring steps differ little in the middle of a schedule, where most of thirty steps lie. The eight steps of a
distilled model differ too much.
"""

from collections.abc import Callable, Iterable

from torch import Tensor, nn


class StepCache:
    """The blocks of one stream of guidance.sample_latents, for the `cache` of LTXVideo.forward.

    The change r of the first block counts as about that of the last full step, r_0, where
    mean |r - r_0| < threshold * mean |r_0|. A threshold of 0 leaves nothing out.
    """

    def __init__(self, threshold: float):
        self.threshold = threshold
        self.change: Tensor | None = None  # of the first block in the last full step, (B, L, D)
        self.rest: Tensor | None = None  # change of all other blocks in that step, (B, L, D)

    def __call__(
        self, run: Callable[[Tensor, Iterable[nn.Module]], Tensor], x: Tensor, blocks: Iterable[nn.Module]
    ) -> Tensor:
        blocks = iter(blocks)
        first = run(x, [next(blocks)])
        change = first - x
        if self.change is not None and (change - self.change).abs().mean() < self.threshold * self.change.abs().mean():
            return first + self.rest
        out = run(first, blocks)
        self.change, self.rest = change, out - first
        return out
