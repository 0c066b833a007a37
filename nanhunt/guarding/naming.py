"""What the modules and parameters of a running program are called."""

from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from nanhunt import measurement
from nanhunt.recorder import Recorder, unrecorded
from nanhunt.records import SinkKind
from nanhunt.replay.ends import named_gradients, read_sink

_OTHER = "other tensors"


def bad_among(tensors: Sequence[Tensor]) -> list[int]:
    """Positions of the tensors that hold NaN or an infinity; to be asked without gradients."""
    if any(map(is_lazy, tensors)):
        return [i for i, t in enumerate(tensors) if not is_lazy(t) and bad_among([t])]
    return measurement.bad_among(tensors)


class Names:
    """The paths of modules by their `id`, and the outermost modules that these begin at."""

    def __init__(self, recorder: Recorder) -> None:
        self._recorder = recorder
        self.paths: dict[int, str] = {}
        # Parameters of which this process has a part: a wrapper gives them their gradients behind
        # the engine's back.
        self.spread: dict[int, Tensor] = {}
        # While they live no other object has the `id` of one of their modules.
        self._roots: dict[str, nn.Module] = {}

    @property
    def subject(self) -> str:
        """What the modules that are trained are called together."""
        trained = (
            name for name, root in self._roots.items() if any(True for _ in root.parameters())
        )
        return " + ".join(trained) or "a block of code"

    def meet(self, module: nn.Module) -> None:
        """Give an outermost module and those inside of it paths that begin with its class."""
        if id(module) not in self.paths:
            name = type(module).__name__
            alike = sum(known.partition(" ")[0] == name for known in self._roots)
            self.learn(module, f"{name} {alike + 1}" if alike else name)

    def learn(self, root: nn.Module, prefix: str = "") -> None:
        """Give the modules inside of one their paths, and note what of it is non-finite by now."""
        own = prefix or type(root).__name__
        self._roots[own] = root
        paths = {id(module): _joined(prefix, name) or own for name, module in root.named_modules()}
        self.paths |= paths
        self._recorder.name_modules(paths)
        self.spread |= {id(p): p for p in root.parameters() if measurement.is_distributed(p)}
        tensors: list[tuple[SinkKind, str, Tensor]] = [
            *(("parameter", name, tensor) for name, tensor in root.named_parameters()),
            *(("buffer", name, tensor) for name, tensor in root.named_buffers()),
            *(("gradient", name, tensor) for name, tensor in named_gradients(root)),
        ]
        with unrecorded(), torch.no_grad():
            for position in bad_among([tensor for _, _, tensor in tensors]):
                kind, name, tensor = tensors[position]
                sink = read_sink(kind, _joined(prefix, name), tensor, None)
                self._recorder.note_state(sink, tensor)

    def of(self, tensors: Iterable[Tensor]) -> Iterator[tuple[str, str, Tensor]]:
        """Each tensor behind the root that it belongs to and its name there."""
        known = {
            id(parameter): (own, name)
            for own, root in self._roots.items()
            for name, parameter in root.named_parameters()
        }
        for tensor in tensors:
            kind = "parameter" if isinstance(tensor, nn.Parameter) else "tensor"
            group, name = known.get(id(tensor), (_OTHER, f"a {kind} {list(tensor.shape)}"))
            yield group, name, tensor


def _joined(prefix: str, name: str) -> str:
    return ".".join(filter(None, (prefix, name)))
