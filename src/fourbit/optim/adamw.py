"""AdamW whose state is laid out in pages, in 32 or 8 bits, resident or not: the same results."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from fourbit.device import is_out_of_memory
from fourbit.distributed import is_shard, local
from fourbit.optim.pages import PAGE_BYTES, RING, Hosted, Mapped, Pages, Resident, Ring, Stats
from fourbit.optim.update import BLOCK, Coefficients, Moment, Run, update_runs

Paging = Literal["auto", "always", "off"]
SMALL = 4096
"""Tensors with fewer elements keep 32-bit state, as in bitsandbytes: they cost next to nothing."""
_ALIGN = 64
_MOMENTS = {"exp_avg": True, "exp_avg_sq": False}
"""Names in state dicts, and whether values have a sign."""


@dataclass(frozen=True)
class _Piece:
    """Elements [start, stop) of one parameter, and where their state lies in a page."""

    parameter: int
    start: int
    stop: int
    bits: int
    offset: int

    @property
    def count(self) -> int:
        return self.stop - self.start

    def moments(self, page: Tensor) -> list[Tensor] | list[Moment]:
        """First and second, as views of the page."""
        at, found = self.offset, []
        for signed in _MOMENTS.values():
            if self.bits == 32:
                found.append(page[at : at + 4 * self.count].view(torch.float32))
            else:
                scales = at + _aligned(self.count)
                absmax = page[scales : scales + 4 * _blocks(self.count)].view(torch.float32)
                found.append(Moment(page[at : at + self.count], absmax, signed))
            at += _moment_bytes(self.count, self.bits)
        return found


def _aligned(count: int) -> int:
    return -(-count // _ALIGN) * _ALIGN


def _blocks(count: int) -> int:
    return -(-count // BLOCK)


def _moment_bytes(count: int, bits: int) -> int:
    if bits == 32:
        return _aligned(4 * count)
    return _aligned(count) + _aligned(4 * _blocks(count))


def state_bits(count: int, optim_bits: int) -> int:
    """In how many bits the state of a tensor of ``count`` elements is kept."""
    return 8 if optim_bits == 8 and count >= SMALL else 32


def resident_bytes(counts: Iterable[int], *, optim_bits: int, paged: bool) -> int:
    """What the state of tensors with these numbers of elements keeps in memory, for a plan."""
    state = sum(2 * _moment_bytes(count, state_bits(count, optim_bits)) for count in counts)
    return min(state, RING * PAGE_BYTES) if paged else state


class AdamW(torch.optim.Optimizer):
    """Decoupled weight decay, bias-corrected moments (arXiv 1711.05101), state in pages.

    The state of all parameters lies in pages of `page_bytes`, in the reverse order of the
    parameters, which is the order in which their gradients come. Where a page is does not change
    what is computed: results are equal bit for bit in every mode.

    Args:
        params: parameters, or groups of them, of any floating dtype; computed in float32.
        lr: learning rate.
        betas: decay of the first and of the second moment.
        eps: added to the root of the second moment.
        weight_decay: decoupled.
        optim_bits: 32, or 8 with a scale for 256 values (arXiv 2110.02861); tensors of fewer than
            4096 elements stay at 32.
        paged: ``auto`` keeps the state in memory until `evict` is called; ``always`` keeps three
            pages there at most; ``off`` keeps all.
        page_bytes: size of a page.
        folder: where pages of parameters on a CPU live, in a file that is gone with the process;
            default: the system's folder for temporary files.

    Raises:
        ValueError: a value out of range.
        EnvironmentFault: the disk has no room for the pages.
    """

    def __init__(  # noqa: PLR0913  # torch's own names
        self,
        params: Iterable[Tensor] | Iterable[dict[str, Any]],
        lr: float = 2e-4,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        optim_bits: int = 32,
        paged: Paging = "auto",
        page_bytes: int = PAGE_BYTES,
        folder: Path | str | None = None,
    ) -> None:
        if optim_bits not in (8, 32):
            raise ValueError(f"optim_bits must be 8 or 32, not {optim_bits}")
        if paged not in ("auto", "always", "off"):
            raise ValueError(f"paged must be auto, always or off, not {paged!r}")
        for name, value, fine in (
            ("lr", lr, lr >= 0),
            ("betas", betas, all(0 <= beta < 1 for beta in betas)),
            ("eps", eps, eps > 0),
            ("weight_decay", weight_decay, weight_decay >= 0),
            ("page_bytes", page_bytes, page_bytes >= 1 << 12),
        ):
            if not fine:
                raise ValueError(f"{name} is out of range: {value}")
        self.optim_bits, self.paged, self.page_bytes = optim_bits, paged, page_bytes
        self._folder = None if folder is None else Path(folder)
        self.forget()
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        super().__init__(params, defaults)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Updates every parameter that has a gradient.

        Raises:
            ValueError: a sparse gradient.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        pages = self._lay_out()
        work = self._work()
        order = [
            page
            for page, pieces in enumerate(self._contents)
            if any(piece.parameter in work for piece in pieces)
        ]
        for place, page in enumerate(order):
            memory = pages.take(page)
            if place + 1 < len(order):
                pages.expect(order[place + 1])
            self._update([p for p in self._contents[page] if p.parameter in work], memory, work)
            pages.give(page)
        for index, (values, _, _) in work.items():
            self._steps[index] += 1
            parameter = self._placed[index]
            own = local(parameter)
            if values.data_ptr() != own.data_ptr():
                own.copy_(values.view(own.shape))
            # native code changed it behind autograd's back
            torch.autograd.graph.increment_version(parameter)
        return loss

    def _work(self) -> dict[int, tuple[Tensor, Tensor, Coefficients]]:
        """Flat values, flat gradient and scalars of every parameter with a gradient."""
        groups = {id(p): group for group in self.param_groups for p in group["params"]}
        work = {}
        for index, parameter in enumerate(self._placed):
            own = local(parameter)
            if parameter.grad is None or id(parameter) not in groups:
                continue
            if own.numel() == 0:
                # of a divided parameter, whose other parts make this step
                self._steps[index] += is_shard(parameter)
                continue
            grad = local(parameter.grad)
            if grad.is_sparse:
                raise ValueError("AdamW takes no sparse gradients")
            scalars = Coefficients.of(groups[id(parameter)], self._steps[index] + 1)
            values, flat = own.detach().contiguous(), grad.to(own.dtype).contiguous()
            work[index] = (values.view(-1), flat.view(-1), scalars)
        return work

    def _update(
        self,
        pieces: Sequence[_Piece],
        memory: Tensor,
        work: Mapping[int, tuple[Tensor, Tensor, Coefficients]],
    ) -> None:
        """Those alike together: a GPU starts one kernel for all of them."""
        alike: dict[tuple[int, torch.dtype, Coefficients], list[Run]] = {}
        for piece in pieces:
            values, grad, scalars = work[piece.parameter]
            run = slice(piece.start, piece.stop)
            parts = Run(values[run], grad[run], *piece.moments(memory))
            alike.setdefault((piece.bits, values.dtype, scalars), []).append(parts)
        for (_, _, scalars), runs in alike.items():
            update_runs(runs, scalars)

    def reserve(self) -> None:
        """Takes the memory of the state now, as the first step would."""
        pages = self._lay_out()
        for page in range(len(self._contents)):
            pages.take(page).bitwise_or_(0)  # touched, or the system would not give it yet
            pages.give(page)

    def evict(self) -> int:
        """Sends the state home, as memory is wanted elsewhere; returns the bytes that became free.

        From then on ``auto`` pages as ``always`` does. With ``off`` nothing happens.
        """
        if self.paged == "off" or self._pages is None:
            return 0
        if isinstance(self._pages, Resident):
            home = self._home()
            freed = self._pages.move_to(home)
            self._pages = home
            return freed
        return self._pages.evict()

    def forget(self) -> None:
        """Gives up all state, as if no update had been made; parameters stay as they are."""
        self.stats = Stats()
        self._placed: list[Tensor] = []
        self._numbers: dict[int, int] = {}
        self._where: dict[int, list[tuple[int, _Piece]]] = {}
        self._contents: list[list[_Piece]] = []
        self._steps: list[int] = []
        self._pages: Pages | None = None

    @property
    def is_paged(self) -> bool:
        """Whether pages leave memory at the moment."""
        return self._pages.paged if self._pages is not None else self.paged == "always"

    def described(self) -> dict[str, Any]:
        """Bits, mode and what paging did, JSON-ready."""
        return {"bits": self.optim_bits, "paged": self.is_paged, **self.stats.as_dict()}

    def _device(self) -> torch.device:
        return self.param_groups[0]["params"][0].device

    def _home(self) -> Ring:
        if self._device().type == "cpu":
            return Mapped(self.stats, self._folder)
        return Hosted(self.stats, self._device())

    def _lay_out(self) -> Pages:
        """Gives pages to parameters that have none yet."""
        if self._pages is None:
            always = self.paged == "always"
            self._pages = self._home() if always else Resident(self.stats, self._device())
        first = len(self._placed)
        fresh = [p for g in self.param_groups for p in g["params"] if id(p) not in self._numbers]
        for index, parameter in enumerate(reversed(fresh), start=first):
            if parameter.device != self._device():
                raise ValueError("AdamW takes parameters of one device")
            self._placed.append(parameter)
            self._numbers[id(parameter)] = index
            self._steps.append(0)
            self._where[index] = []
        sizes = [local(parameter).numel() for parameter in self._placed]
        for page in _cut(sizes, first, self.optim_bits, self.page_bytes):
            last = page[-1]
            self._add_page(last.offset + 2 * _moment_bytes(last.count, last.bits))
            for piece in page:
                self._where[piece.parameter].append((len(self._contents), piece))
            self._contents.append(page)
        return self._pages

    def _add_page(self, size: int) -> None:
        assert self._pages is not None
        try:
            self._pages.add(size)
        except (MemoryError, RuntimeError, OSError) as error:
            if not is_out_of_memory(error) or not self.evict():
                raise
            self._pages.add(size)

    # State dicts: the layout of torch.optim.AdamW, with absmax beside moments in 8 bits.

    def parts_of(self, parameter: Tensor) -> list[str]:
        """The keys of `state_of`, without its tensors."""
        index = self._numbers.get(id(parameter))
        if index is None or self._steps[index] == 0:
            return []
        if state_bits(local(parameter).numel(), self.optim_bits) == 32:
            return ["step", *_MOMENTS]
        return ["step", *(key for name in _MOMENTS for key in (name, f"{name}_absmax"))]

    def state_of(self, parameter: Tensor) -> dict[str, Tensor]:
        """A copy of the state of one parameter; empty before its first update.

        Keys: ``step`` (float32, no dimension), ``exp_avg`` and ``exp_avg_sq`` in the parameter's
        shape; for 8 bits these are uint8 codes, with ``exp_avg_absmax`` and ``exp_avg_sq_absmax``,
        float32 ``[ceil(n / 256)]``.
        """
        index = self._numbers.get(id(parameter))
        if index is None or self._steps[index] == 0:
            return {}
        assert self._pages is not None
        parts: dict[str, list[Tensor]] = {}
        for page, piece in self._where[index]:
            memory = self._pages.take(page)
            for name, moment in zip(_MOMENTS, piece.moments(memory), strict=True):
                if isinstance(moment, Moment):
                    parts.setdefault(name, []).append(moment.codes.clone())
                    parts.setdefault(f"{name}_absmax", []).append(moment.absmax.clone())
                else:
                    parts.setdefault(name, []).append(moment.clone())
            self._pages.give(page)
        state = {"step": torch.tensor(float(self._steps[index]))}
        if local(parameter).numel() == 0:
            state |= {name: torch.zeros_like(local(parameter)) for name in _MOMENTS}
        for name, pieces in parts.items():
            whole = pieces[0] if len(pieces) == 1 else torch.cat(pieces)
            state[name] = whole.view(local(parameter).shape) if name in _MOMENTS else whole
        return state

    def restore(self, parameter: Tensor, state: Mapping[str, Tensor]) -> None:
        """Puts back what `state_of` gave; moments in other bits are converted.

        Raises:
            ValueError: the state is of a tensor of another size, or a part is missing.
        """
        pages = self._lay_out()
        index = self._numbers[id(parameter)]
        count = local(parameter).numel()
        for name in _MOMENTS:
            if name not in state or state[name].numel() != count:
                raise ValueError(f"{name} does not fit a parameter of {count} elements")
        for page, piece in self._where[index]:
            memory = pages.take(page)
            for name, moment in zip(_MOMENTS, piece.moments(memory), strict=True):
                _fill(moment, state[name].reshape(-1), state.get(f"{name}_absmax"), piece, name)
            pages.give(page)
        self._steps[index] = int(state["step"])

    def state_dict(self) -> dict[str, Any]:
        """As `torch.optim.Optimizer.state_dict`; every tensor in it is a copy."""
        whole = super().state_dict()
        states = {index: self.state_of(parameter) for index, parameter in self._numbered()}
        whole["state"] = {index: state for index, state in states.items() if state}
        return whole

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes what `state_dict` gave, in any mode, or what ``torch.optim.AdamW`` gave.

        The state stays paged as this optimizer is.

        Raises:
            ValueError: the state belongs to other parameters.
        """
        super().load_state_dict({**state_dict, "state": {}})
        for index, parameter in self._numbered():
            if index in state_dict["state"]:
                self.restore(parameter, state_dict["state"][index])

    def _numbered(self) -> Iterator[tuple[int, Tensor]]:
        return enumerate(p for group in self.param_groups for p in group["params"])


def _cut(sizes: list[int], first: int, optim_bits: int, page_bytes: int) -> Iterator[list[_Piece]]:
    """Pieces of parameters of these sizes from the ``first`` on, by page, cut between blocks."""
    page: list[_Piece] = []
    offset = 0
    for index in range(first, len(sizes)):
        count, start = sizes[index], 0
        bits = state_bits(count, optim_bits)
        while start < count:
            # the alignment of its four parts may cost a piece as much as this
            room = page_bytes - offset - 4 * _ALIGN
            fit = room * 8 // (2 * bits + (2 * 32 / BLOCK if bits == 8 else 0)) // BLOCK * BLOCK
            part = min(count - start, int(fit))
            if part <= 0 and page:
                yield page
                page, offset = [], 0
                continue
            part = max(part, min(count - start, BLOCK))
            page.append(_Piece(index, start, start + part, bits, offset))
            offset += 2 * _moment_bytes(part, bits)
            start += part
    if page:
        yield page


def _fill(
    moment: Tensor | Moment, values: Tensor, absmax: Tensor | None, piece: _Piece, name: str
) -> None:
    """Writes a piece's part of a saved moment, given flat, into its place."""
    part = values[piece.start : piece.stop]
    if values.dtype == torch.uint8:
        if absmax is None or absmax.numel() != _blocks(values.numel()):
            raise ValueError(f"{name}_absmax does not fit {name}")
        scales = absmax[piece.start // BLOCK : _blocks(piece.stop)]
        if isinstance(moment, Moment):
            moment.codes.copy_(part)
            moment.absmax.copy_(scales)
        else:
            saved = Moment(part, scales.float(), _MOMENTS[name])
            moment.copy_(saved.decode())
    elif isinstance(moment, Moment):
        moment.encode_(part.to(moment.codes.device, torch.float32))
    else:
        moment.copy_(part)
