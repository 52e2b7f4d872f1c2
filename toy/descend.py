"""The loop that trains the small networks of the drawn world."""

from collections.abc import Callable, Iterator

from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import OneCycleLR
from tqdm import tqdm

Loss = Callable[[int], Tensor]  # of a step


def descend(
    title: str, optimizer: Optimizer, loss: Loss, steps: int, rise: float = 0.1, clip: float = 1.0, cycle: bool = True
) -> Iterator[float]:
    """Minimize a loss. Yields its value at each step.

    The learning rate rises for a part `rise` of the steps, then falls to nearly zero. With `cycle` the optimizer's
    momentum moves against the learning rate. `clip`: the largest norm of the gradients.
    """
    (group,) = optimizer.param_groups
    rise = 0.0 if rise * steps == 1 else rise  # OneCycleLR divides by rise * steps - 1
    schedule = OneCycleLR(optimizer, group["lr"], steps, pct_start=rise, cycle_momentum=cycle)
    bar = tqdm(range(steps), title, unit="step")
    for step in bar:
        value = loss(step)
        optimizer.zero_grad()
        value.backward()
        nn.utils.clip_grad_norm_(group["params"], clip)
        optimizer.step()
        schedule.step()
        bar.set_postfix_str(f"loss {value.item():.4f}", refresh=False)
        yield value.item()
