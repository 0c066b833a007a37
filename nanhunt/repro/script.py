"""The script and the tensors beside it: what is pasted into an issue."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from nanhunt.recorder.captured import Layout, layout_of, memory_between
from nanhunt.repro.scene import Look, Result, Scene
from nanhunt.repro.spelling import call_of

SCRIPT, OPERANDS = "repro.py", "operands.safetensors"
MARK = "Written by nanhunt"  # by which a folder is known as one that may be replaced
_GENERATOR = "generator state"
WORDS = {"reproduced": 0, "did not reproduce": 1}  # its last line, and its exit code


@dataclass(frozen=True, slots=True)
class Pages:
    """The text of the script, and the tensors of the file that it reads."""

    text: str
    tensors: Mapping[str, Tensor]


def pages_of(scene: Scene, look: Look, about: Sequence[str]) -> Pages:
    """Write the script of a scene; `about` are the lines of its docstring."""
    tensors: dict[str, Tensor] = {}
    restored = [*_restored(scene, tensors)]
    shown = scene.results()[look.position]
    lines = [
        f'"""{_quoted(about)}',
        "",
        f'{MARK}; needs torch and safetensors alone."""',
        "",
        "from pathlib import Path",
        "",
        "import torch",
        "from safetensors.torch import load_file",
        "",
        f't = load_file(Path(__file__).with_name("{OPERANDS}"){_device(scene)})',
        *restored,
        *_run(scene),
        *_judged(shown, look),
    ]
    return Pages("\n".join(lines) + "\n", tensors)


def _quoted(about: Sequence[str]) -> str:
    """Words for a docstring, whatever stands in them."""
    lines = ("".join(c if c.isprintable() else " " for c in line) for line in about)
    return "\n".join(lines).replace("\\", "\\\\").replace('"""', "'''")


def _device(scene: Scene) -> str:
    return "" if scene.home.type == "cpu" else f', device="{scene.home}"'


def _run(scene: Scene) -> Iterator[str]:
    """The lines that call the op, and its backward."""
    if scene.generator is not None:
        state = f't["{_GENERATOR}"]'
        is_cuda = scene.home.type == "cuda"
        drawn = f'torch.cuda.set_rng_state({state}.cpu(), "{scene.home}")'
        yield drawn if is_cuda else f"torch.set_rng_state({state})"
    yield f"y = {call_of(scene)}"
    if not scene.incoming:
        return
    args, kwargs = scene.arguments()
    with torch.enable_grad():
        answered = scene.answered(scene.func(*args, **kwargs))
    names = {id(tensor): name for name, tensor in scene.named.items()}
    outputs = [expression for expression, _, _ in answered]
    inputs = [f't["{name}"]' for name in scene.trained]
    given = [f't["{names[id(scene.incoming[o.output_nr])]}"]' for _, _, o in answered]
    told = ", ".join(v[0] if len(v) == 1 else f"[{', '.join(v)}]" for v in (outputs, inputs, given))
    unused = ", allow_unused=True" if len(inputs) > 1 else ""
    yield f"grads = torch.autograd.grad({told}{unused})"


def _judged(shown: Result, look: Look) -> Iterator[str]:
    """The lines that look at a result, tell what is not finite, and leave with the verdict."""
    values, at = shown.expression, ""
    if shown.tensor.layout is torch.sparse_coo:
        values = f"{values}.coalesce().values()"
    elif shown.tensor.layout is not torch.strided:
        values = f"{values}.values()"
    if shown.tensor.is_floating_point() and shown.tensor.element_size() == 1:
        values = f"{values}.float()"
    if look.at is not None:
        at = f"[{', '.join(map(str, look.at))}]" if look.at else ""
    yield f"shown = {values}{at}"
    kind = "isnan(shown)" if look.kind == "nan" else "isfinite(shown).logical_not()"
    yield f"bad = torch.{kind}"
    words = "NaN" if look.kind == "nan" else "NaN or infinite"
    told = f"{shown.name}{at}: {{int(bad.sum())}} of {{bad.numel()}} elements {words}, first"
    yield f'print(f"{told} {{shown[bad][:4].tolist()}}")'
    yield 'print("reproduced" if bad.any() else "did not reproduce")'
    yield "raise SystemExit(0 if bad.any() else 1)"


# -- tensors on disk -------------------------------------------------------------------------------


def _restored(scene: Scene, tensors: dict[str, Tensor]) -> Iterator[str]:
    """Put every tensor among those to be saved; the lines that make of them what the op was given.

    The file holds plain contiguous numbers. Strides, views of one memory, complex and sparse
    tensors are made again by the script.
    """
    memories: dict[tuple[int, torch.dtype], list[str]] = {}
    strided = {n: t for n, t in scene.named.items() if t.layout is torch.strided}
    layouts = {name: layout_of(tensor) for name, tensor in strided.items()}
    for name, layout in layouts.items():
        memories.setdefault((layout.storage, layout.dtype), []).append(name)
    for number, names in enumerate(memories.values()):
        start = min(layouts[name].offset for name in names)
        end = max(layouts[name].end for name in names)
        first = names[0]
        memory = memory_between(strided[first], start, end)
        stem = first if len(names) == 1 else f"memory.{number}"
        is_plain = len(names) == 1 and strided[first].is_contiguous()
        tensors[stem] = _real(memory.view(strided[first].shape) if is_plain else memory)
        for name in names:
            yield from _line(stem, name, layouts[name], None if is_plain else start)
    for name, tensor in scene.named.items():
        if tensor.layout is not torch.strided:
            yield from _sparse(name, tensor, tensors)
    for name, tensor in scene.named.items():
        if tensor.device != scene.home:
            yield f't["{name}"] = t["{name}"].to("{tensor.device}")'
    if scene.generator is not None:
        tensors[_GENERATOR] = scene.generator
    trained = list(scene.trained)
    yield from (f't["{name}"].requires_grad_()' for name in trained[:3])
    if len(trained) > 3:
        listed = ", ".join(f'"{name}"' for name in trained[3:])
        yield f"for name in [{listed}]:"
        yield "    t[name].requires_grad_()"


def _real(tensor: Tensor) -> Tensor:
    """A complex tensor as pairs of real numbers: not every version of the format knows others."""
    return torch.view_as_real(tensor) if tensor.is_complex() else tensor


def _line(stem: str, name: str, layout: Layout, start: int | None) -> Iterator[str]:
    told = f't["{stem}"]'
    if layout.dtype.is_complex:
        told = f"torch.view_as_complex({told})"
    if start is not None:
        told += f".as_strided({layout.shape}, {layout.stride}, {layout.offset - start})"
    if layout.is_neg:
        told = f"torch._neg_view({told})"
    if layout.is_conj:
        told += ".conj()"
    if told != f't["{name}"]':
        yield f't["{name}"] = {told}'


def _sparse(name: str, tensor: Tensor, tensors: dict[str, Tensor]) -> Iterator[str]:
    """A sparse tensor by its parts."""
    size = tuple(tensor.shape)
    plain = tensor.detach()
    if plain.layout is torch.sparse_coo:
        parts = {"indices": plain._indices(), "values": plain._values()}  # noqa: SLF001 - uncoalesced too
        made = f"torch.sparse_coo_tensor({{}}, {size}, is_coalesced={plain.is_coalesced()})"
    else:
        is_rows = plain.layout in (torch.sparse_csr, torch.sparse_bsr)
        compressed, other = (
            (plain.crow_indices(), plain.col_indices())
            if is_rows
            else (plain.ccol_indices(), plain.row_indices())
        )
        parts = {"compressed": compressed, "plain": other, "values": plain.values()}
        made = f"torch.sparse_compressed_tensor({{}}, {size}, layout={plain.layout})"
    told = []
    for part, values in parts.items():
        tensors[f"{name}.{part}"] = _real(values.clone(memory_format=torch.contiguous_format))
        text = f't["{name}.{part}"]'
        told.append(f"torch.view_as_complex({text})" if values.is_complex() else text)
    yield f't["{name}"] = {made.format(", ".join(told))}'
