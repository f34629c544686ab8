"""Checks of arguments: one helper per fact, one wording each.

Every message says what was given, what is allowed and what to do. The checks stand at the doors
(`solve`, operator constructors, module forwards); behind them the code trusts its arguments.
"""

import math
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
INTEGERS = (torch.int32, torch.int64)


def shape_text(x: Tensor) -> str:
    """The shape of a tensor as it stands in messages, e.g. ``[4, 3]``."""
    return str(list(x.shape))


def floating(x: object, name: str) -> Tensor:
    """`x`, if it is a real floating-point tensor."""
    if not isinstance(x, Tensor):
        what = f"take one of {list(x)}" if isinstance(x, Mapping) else "use torch.as_tensor"
        raise TypeError(f"{name}: expected a torch.Tensor, got {type(x).__name__}; {what}")
    if x.dtype not in FLOATS:
        raise TypeError(
            f"{name}: expected a real floating-point tensor, got {x.dtype}; convert it with {name}.float()"
        )
    return x


def floating_dtype(dtype: torch.dtype | None, default: torch.dtype) -> torch.dtype:
    """`dtype` if it is one of real floating-point numbers, `default` if it is None."""
    if dtype is not None and dtype not in FLOATS:
        raise TypeError(f"dtype: expected a real floating-point dtype such as torch.float32, got {dtype}")
    return dtype or default


def same_dtype(x: Tensor, name: str, dtype: torch.dtype, owner: str) -> None:
    """`x` has the dtype of `owner`."""
    if x.dtype != dtype:
        raise TypeError(
            f"{name}: expected dtype {dtype} like {owner}, got {x.dtype}; convert one of them with .to(...)"
        )


def same_device(x: Tensor, name: str, device: torch.device, owner: str) -> None:
    """`x` lies on the device of `owner`."""
    if x.device != device:
        raise ValueError(
            f"{name}: expected device {device} like {owner}, got {x.device}; move one of them with .to(...)"
        )


def finite(x: Tensor, name: str) -> None:
    """`x` holds neither nan nor infinity."""
    # What is not finite makes the sum so, which is a tenth of the work; huge numbers may do that too.
    if not math.isfinite(float(x.detach().sum())) and not bool(torch.isfinite(x).all()):
        bad = int((~torch.isfinite(x)).sum())
        raise ValueError(f"{name}: expected finite values, got {bad} that are nan or infinite of {x.numel()}")


def nonnegative(x: Tensor, name: str) -> None:
    """`x` holds no negative value."""
    if x.numel() and bool(x.detach().amin() < 0):
        raise ValueError(
            f"{name}: expected values ≥ 0, got a smallest value of {float(x.detach().min()):.3g}; "
            "a walk has no negative probabilities, so shift or exponentiate the affinity first"
        )


def listed(features: object) -> None:
    """`features` is a list or tuple, as networks that return maps by name do not make it."""
    if isinstance(features, (list, tuple)):
        return
    given = type(features).__name__
    what = "list(features.values())" if isinstance(features, Mapping) else "[features]"
    raise TypeError(f"features: expected a list of tensors or of transitions, got {given}; give {what}")


def channel_counts(feature_channels: object) -> list[int]:
    """How many channels each feature has."""
    if not isinstance(feature_channels, Iterable) or isinstance(feature_channels, str):
        raise TypeError(
            "feature_channels: expected a list of numbers, one for each feature, got "
            f"{feature_channels!r}; give [{feature_channels!r}] for one"
        )
    return [positive_integer(c, "feature_channels") for c in feature_channels]


def node_mask(mask: object, shape: Sequence[int], device: torch.device) -> Tensor:
    """`mask`, if it says of every node of such a shape [..., N] whether it is real."""
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
        given = str(mask.dtype) if isinstance(mask, Tensor) else type(mask).__name__
        raise TypeError(f"mask: expected a torch.bool tensor, True at real nodes, got {given}")
    same_device(mask, "mask", device, "the nodes")
    if tuple(mask.shape) != tuple(shape):
        raise ValueError(
            f"mask: expected shape {list(shape)}, one value per node, got {shape_text(mask)}; expand it "
            "where graphs share one"
        )
    return mask


def real(x: Tensor, mask: Tensor | None) -> Tensor:
    """x [..., N, K] with 0 at padded nodes, whatever stands there."""
    return x if mask is None else torch.where(mask.unsqueeze(-1), x, 0.0)


def square(x: Tensor, name: str) -> None:
    """`x` is [..., N, N] with N ≥ 1."""
    if x.ndim < 2 or x.shape[-1] != x.shape[-2] or x.shape[-1] == 0:
        raise ValueError(f"{name}: expected shape [..., N, N] with N ≥ 1, got {shape_text(x)}")


def signal(s: object, nodes: int, name: str = "s") -> Tensor:
    """A signal as [..., N, K]; [N] becomes [N, 1]."""
    given = s = floating(s, name)
    if s.ndim == 1:
        s = s.unsqueeze(-1)
    if s.ndim == 0 or s.shape[-1] == 0 or s.shape[-2] != nodes:
        what = ""
        if s.numel() == nodes:
            what = f"; a map of pixels is a signal as {name}.flatten()"
        elif s.ndim > 2 and s.shape[-2] * s.shape[-1] == nodes:
            what = f"; maps [..., K, H, W] are a signal as {name}.flatten(-2).mT"
        raise ValueError(
            f"{name}: expected shape [..., N, K] or [N] with N = {nodes} nodes and K ≥ 1, got "
            f"{shape_text(given)}{what}"
        )
    return s


def broadcast_batch(shapes: Sequence[torch.Size], names: str) -> torch.Size:
    """The common leading shape of several arguments."""
    if shapes.count(shapes[0]) == len(shapes):
        # torch compares dimension by dimension, which takes longer than a small product.
        return torch.Size(shapes[0])
    try:
        return torch.Size(torch.broadcast_shapes(*shapes))  # type: ignore[no-untyped-call]
    except RuntimeError:
        given = " and ".join(str(list(shape)) for shape in shapes)
        raise ValueError(f"{names}: expected leading dimensions that broadcast, got {given}") from None


def some_graph(batch: torch.Size, names: str) -> None:
    """A leading shape with at least one graph in it."""
    if 0 in batch:
        raise ValueError(
            f"{names}: expected at least one graph, got leading dimensions {list(batch)}; leave the call out"
        )


def mu(value: float | Tensor, signal_shape: torch.Size, device: torch.device) -> Tensor:
    """µ as a floating tensor [..., 1 or N, 1 or K], checked to lie in [0, 1).

    A Python number becomes float64, so that it means itself in a float32 problem too.
    """
    nodes, channels = signal_shape[-2:]
    if isinstance(value, Tensor):
        mu = floating(value, "mu")
        same_device(mu, "mu", device, "the operator")
        if mu.ndim == 0:
            mu = mu.reshape(1, 1)
        elif mu.ndim == 1:
            raise ValueError(
                f"mu: a bare shape {shape_text(mu)} is ambiguous; give [1, {channels}] for one µ per channel "
                f"(mu.unsqueeze(0)) or [{nodes}, 1] for one per node (mu.unsqueeze(-1))"
            )
        if tuple(mu.shape[-2:]) not in {(1, 1), (1, channels), (nodes, 1)}:
            raise ValueError(
                f"mu: expected a number, a 0-d tensor, [..., 1, K] with K = {channels} or [..., N, 1] with "
                f"N = {nodes}, got {shape_text(mu)}"
            )
    elif isinstance(value, int | float) and not isinstance(value, bool):
        # float64 does not exist on every device; float32 then holds the nearest number.
        dtype = torch.float32 if device.type == "mps" else torch.float64
        mu = torch.full((1, 1), float(value), dtype=dtype, device=device)
    else:
        raise TypeError(f"mu: expected a number or a tensor, got {type(value).__name__}")
    if mu.dtype == torch.float64 and not isinstance(value, Tensor):
        _within(float(value), float(value), "mu")
    else:
        _below_one(mu, "mu")
    return mu


def mus(values: Sequence[float] | Tensor, device: torch.device) -> Tensor:
    """A path of µ as a floating tensor [M], checked to lie in [0, 1); Python numbers become float64."""
    if isinstance(values, Tensor):
        path = floating(values, "mus")
        same_device(path, "mus", device, "the operator")
    elif isinstance(values, Sequence) and all(
        isinstance(x, int | float) and not isinstance(x, bool) for x in values
    ):
        path = torch.tensor([float(x) for x in values], dtype=widest(device), device=device)
    else:
        raise TypeError(
            f"mus: expected a list of numbers or a tensor [M], got {type(values).__name__}; for a single µ "
            "there is solve"
        )
    if path.ndim != 1 or path.numel() == 0:
        raise ValueError(
            f"mus: expected shape [M] with M ≥ 1, got {shape_text(path)}; one µ per channel or node goes "
            "into solve"
        )
    _below_one(path, "mus")
    return path


def _below_one(mu: Tensor, name: str) -> None:
    if mu.numel() == 0:
        return
    low, high = (float(end) for end in mu.detach().aminmax())
    _within(low, high, name)


def _within(low: float, high: float, name: str) -> None:
    if not 0 <= low <= high < 1:
        raise ValueError(
            f"{name}: expected 0 ≤ µ < 1, got values from {low:.6g} to {high:.6g}; "
            "at µ = 1 the system is singular"
        )


def time(value: float | Tensor, signal_shape: torch.Size, device: torch.device) -> Tensor:
    """A time t ≥ 0 as a floating tensor [..., 1, 1 or K]; a Python number becomes float64."""
    channels = signal_shape[-1]
    if isinstance(value, Tensor):
        t = floating(value, "t")
        same_device(t, "t", device, "the operator")
        t = t.reshape(1, 1) if t.ndim == 0 else t
        if t.ndim == 1 or tuple(t.shape[-2:]) not in {(1, 1), (1, channels)}:
            raise ValueError(
                f"t: expected a number, a 0-d tensor or [..., 1, K] with K = {channels}, got "
                f"{shape_text(t)}; nodes have one time: with one for each, diag(t)(I − P) is another operator"
            )
    elif isinstance(value, int | float) and not isinstance(value, bool):
        t = torch.full((1, 1), float(value), dtype=widest(device), device=device)
    else:
        raise TypeError(f"t: expected a number or a tensor, got {type(value).__name__}")
    if not bool((torch.isfinite(t) & (t >= 0)).all()):
        low, high = (float(end) for end in t.detach().aminmax())
        raise ValueError(f"t: expected finite times ≥ 0, got values from {low:.6g} to {high:.6g}")
    return t


def coefficients(values: Sequence[float] | Tensor, channels: int, device: torch.device) -> Tensor:
    """Coefficients of a polynomial as a floating tensor [n + 1, 1 or K]; Python numbers become float64."""
    if isinstance(values, Tensor):
        c = floating(values, "coefficients")
        same_device(c, "coefficients", device, "the operator")
    elif isinstance(values, Sequence) and all(
        isinstance(x, int | float) and not isinstance(x, bool) for x in values
    ):
        c = torch.tensor([float(x) for x in values], dtype=widest(device), device=device)
    else:
        raise TypeError(
            f"coefficients: expected a list of numbers or a tensor, got {type(values).__name__}; use "
            "torch.as_tensor"
        )
    given = shape_text(c)
    c = c.unsqueeze(-1) if c.ndim == 1 else c
    if c.ndim != 2 or len(c) == 0 or c.shape[1] not in {1, channels}:
        raise ValueError(
            f"coefficients: expected shape [n + 1], or [n + 1, K] with K = {channels} channels, got {given}"
        )
    finite(c, "coefficients")
    return c


def fraction(value: float, name: str) -> float:
    """A Python number in (0, 1)."""
    if not (isinstance(value, int | float) and 0.0 < value < 1.0):
        raise ValueError(f"{name}: expected a number between 0 and 1, both excluded, got {value!r}")
    return float(value)


def closed_fraction(value: float, name: str, *, below_one: bool = False) -> float:
    """A Python number in [0, 1], or [0, 1)."""
    if not (isinstance(value, int | float) and 0.0 <= value <= 1.0) or (below_one and value == 1):
        allowed = "0 ≤ number < 1" if below_one else "0 ≤ number ≤ 1"
        raise ValueError(f"{name}: expected {allowed}, got {value!r}")
    return float(value)


def positive_number(value: float, name: str) -> float:
    """A finite Python number > 0."""
    if not (isinstance(value, int | float) and math.isfinite(value) and value > 0):
        raise ValueError(f"{name}: expected a finite number > 0, got {value!r}")
    return float(value)


def nonnegative_number(value: float, name: str) -> float:
    """A finite Python number ≥ 0."""
    if not (isinstance(value, int | float) and math.isfinite(value) and value >= 0):
        raise ValueError(f"{name}: expected a finite number ≥ 0, got {value!r}")
    return float(value)


def positive_integer(value: int, name: str) -> int:
    """A Python integer ≥ 1."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{name}: expected an integer ≥ 1, got {value!r}")
    return value


def integers(x: object, name: str) -> Tensor:
    """`x`, if it is a tensor of int32 or int64."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{name}: expected a torch.Tensor, got {type(x).__name__}; use torch.as_tensor")
    if x.dtype not in INTEGERS:
        raise TypeError(
            f"{name}: expected an int32 or int64 tensor, got {x.dtype}; convert it with {name}.long()"
        )
    return x


def node_numbers(x: Tensor, name: str, nodes: int) -> None:
    """`x` holds node numbers, 0 to N - 1."""
    if x.numel() == 0:
        return
    smallest, largest = x.aminmax()
    if int(smallest) < 0 or int(largest) >= nodes:
        first = int(x[(x < 0) | (x >= nodes)][0])
        raise ValueError(
            f"{name}: expected node numbers from 0 to {nodes - 1} for N = {nodes} nodes, got {first}; "
            "number the nodes from 0, or say how many there are"
        )


def clamped_nodes(x: object, nodes: int, name: str) -> Tensor:
    """`x`, if it is bool, [..., N]."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{name}: expected a torch.Tensor, got {type(x).__name__}; use torch.as_tensor")
    if x.dtype != torch.bool:
        raise TypeError(f"{name}: expected a bool tensor, got {x.dtype}; compare it, as in {name} > 0")
    if x.ndim == 0 or x.shape[-1] != nodes:
        raise ValueError(f"{name}: expected shape [..., N] with N = {nodes} nodes, got {shape_text(x)}")
    return x


def shaped(x: Tensor, name: str, shape: Sequence[int], meaning: str) -> None:
    """`x` has exactly this shape."""
    if tuple(x.shape) != tuple(shape):
        raise ValueError(f"{name}: expected shape {list(shape)}, {meaning}, got {shape_text(x)}")


def distribution(x: object, name: str, nodes: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """`x`, if it is [..., N], ≥ 0 and sums to 1 over the nodes."""
    x = floating(x, name)
    same_dtype(x, name, dtype, "the operator")
    same_device(x, name, device, "the operator")
    if x.ndim == 0 or x.shape[-1] != nodes:
        raise ValueError(f"{name}: expected shape [..., N] with N = {nodes} nodes, got {shape_text(x)}")
    finite(x, name)
    nonnegative(x, name)
    totals = x.detach().sum(-1, dtype=widest(x.device))
    off = (totals - 1).abs()
    if bool((off > sum_tolerance(nodes, x.dtype)).any()):
        raise ValueError(
            f"{name}: expected probabilities that sum to 1, got {float(totals.flatten()[off.argmax()]):.6g}; "
            f"divide by {name}.sum(-1, keepdim=True)"
        )
    return x


def widest(device: torch.device) -> torch.dtype:
    """The best precision at hand: float64, which MPS does not have."""
    return torch.float32 if device.type == "mps" else torch.float64


def sum_tolerance(terms: int, dtype: torch.dtype) -> float:
    """How far probabilities may sum from 1: each is rounded by eps/2 of itself, and so is their sum."""
    return float(8 * max(terms, 1) ** 0.5 * torch.finfo(dtype).eps)
