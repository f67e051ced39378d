"""NVIDIA machine code as nvdisasm prints it: what a kernel's main way through it issues."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

LOADS, STORES = ("LDG", "LD", "LDGSTS"), ("STG", "ST")  # of global memory; LD and ST find out which memory it is

_SECTION = re.compile(r"\.section\s+\.text\.(\S+?),")
_LABEL = re.compile(r"^(\.L_x?_?\w+|\S+):\s*$")
_INSTRUCTION = re.compile(r"/\*[0-9a-f]{4,}\*/\s+(.+?)\s*;")
_ACCESS = re.compile(r"((?:@\S+ )?(?:LDG?|STG?)\b\S*) .*?\[(R\d+)[^\]]*?(?:\+(0x[0-9a-f]+))?\]")
_WRITTEN = re.compile(r"^(?:@\S+ )?(?!ST|STG|STS|STL|RED)\S+ (R\d+)\b")
_TARGET = re.compile(r"`\((\.L_\w+)\)")
_JUMPS = ("BRA", "JMP", "BRX", "UBRA", "JMX", "CALL")  # a CALL of a label in the same function is a far jump
_ENDS = ("EXIT", "RET", "KILL", "BPT")


@dataclass
class Block:
    """Instructions that run one after the other, and the blocks that may follow."""

    instructions: list[str] = field(default_factory=list)
    successors: list[int] = field(default_factory=list)

    @property
    def calls(self) -> bool:
        """Whether it hands over to a subroutine: the rare cases of square root and division."""
        return any(opcode(line).startswith("CALL") and not _TARGET.search(line) for line in self.instructions)

    def has(self, names: Sequence[str], part: str) -> bool:
        """Whether some opcode is one of these and has `part` among its modifiers."""
        return any(name.partition(".")[0] in names and part in name for name in map(opcode, self.instructions))


def opcode(instruction: str) -> str:
    """LDG.E.128 of "@!P0 LDG.E.128 R16, desc[UR6][R2.64]"."""
    words = instruction.split()
    return words[1] if words[0].startswith("@") else words[0]


def functions(listing: str) -> dict[str, list[Block]]:
    """The blocks of each function in the output of `nvdisasm -c`, the entry first."""
    listings: dict[str, list[str]] = {}
    lines: list[str] = []
    for line in listing.splitlines():
        section = _SECTION.search(line)
        if section:
            lines = listings[section[1]] = []
        else:
            lines.append(line)
    return {name: _blocks(own) for name, own in listings.items()}


class Ways:
    """The ways through a function that move its data.

    Once round the smallest loop that holds a 128-bit store (where there is none any store, else any load), or from
    entry to exit where no loop does. An inner loop counts once. Blocks that call a subroutine are left out: the rare
    arguments of a root or a division.

    Attributes:
        blocks: all of the function's.
        inner_loops: how many loops lie inside.
    """

    def __init__(self, blocks: Sequence[Block]) -> None:
        self.blocks = blocks
        kinds = ((STORES, "128"), (STORES, ""), (LOADS, ""))
        marked = ([block.has(*kind) for block in blocks] for kind in kinds)
        self._marks = next((marks for marks in marked if any(marks)), [False] * len(blocks))
        self._backward = set(_backward_edges(blocks))
        loops = [(_loop(blocks, tail, head), head, tail) for tail, head in self._backward]
        own = [loop for loop in loops if any(self._marks[b] for b in loop[0])]
        self._tail: int | None
        inside, self._head, self._tail = min(own, key=lambda loop: len(loop[0])) if own else (_all(blocks), 0, None)
        self._order = self._from_last({b for b in inside if not blocks[b].calls or b in (self._head, self._tail)})
        self.inner_loops = sum(head in inside and head != self._head for _, head in self._backward)

    def heaviest(self, weights: Sequence[float] | None = None) -> list[Block]:
        """The way with the largest sum of the blocks' weights, by default their instructions; empty where none is."""
        blocks = self.blocks
        weights = weights or [len(block.instructions) for block in blocks]
        best: dict[tuple[int, bool], tuple[float, int]] = {}  # (block, mark still owed) -> (weight from here on, next)
        for b in self._order:
            for owed in (False, True):
                left = owed and not self._marks[b]
                following = [s for s in blocks[b].successors if (b, s) not in self._backward and (s, left) in best]
                ways = [(best[s, left][0], s) for s in following]
                if not left and (b == self._tail if self._tail is not None else _exits(blocks[b])):
                    ways.append((0.0, -1))
                if ways:
                    weight, after = max(ways)
                    best[b, owed] = weights[b] + weight, after
        way, b, owed = [], self._head, any(self._marks)
        while b >= 0 and (b, owed) in best:
            way.append(blocks[b])
            b, owed = best[b, owed][1], owed and not self._marks[b]
        return way

    def _from_last(self, usable: set[int]) -> list[int]:
        """Blocks that can be reached, each after all that follow it."""
        order, seen = [], {self._head}
        stack = [(self._head, iter(self.blocks[self._head].successors))]
        while stack:
            block, following = stack[-1]
            for successor in following:
                if successor in usable and successor not in seen and (block, successor) not in self._backward:
                    seen.add(successor)
                    stack.append((successor, iter(self.blocks[successor].successors)))
                    break
            else:
                order.append(block)
                stack.pop()
        return order


def count(blocks: Iterable[Block]) -> Counter[str]:
    """How often each opcode without its modifiers, "LDG" of LDG.E.128."""
    return Counter(opcode(line).partition(".")[0] for block in blocks for line in block.instructions)


def accesses(blocks: Iterable[Block], names: Sequence[str]) -> Counter[int]:
    """How often these, LOADS or STORES, have each width in bits."""
    widths: Counter[int] = Counter()
    for block in blocks:
        for name in map(opcode, block.instructions):
            if name.partition(".")[0] in names:
                widths[next((bits for bits in (128, 64, 16, 8) if re.search(rf"\.[US]?{bits}\b", name)), 32)] += 1
    return widths


def streamed(block: Block) -> int:
    """Bytes that a thread surely moves, in 128-bit accesses.

    Left out is what has a predicate: an operand that may be absent; and what is read from 32 bytes behind a base or
    further: a row of coefficients, the same for all threads. A stream of elements has at most two accesses a base.
    """
    open_bases: dict[str, list[tuple[str, int]]] = {}
    closed: list[list[tuple[str, int]]] = []
    for line in block.instructions:
        access = _ACCESS.search(line)
        if access:
            open_bases.setdefault(access[2], []).append((access[1], int(access[3] or "0", 16)))
        written = _WRITTEN.search(line)
        if written and written[1] in open_bases:
            closed.append(open_bases.pop(written[1]))
    streams = [own for own in (*closed, *open_bases.values()) if max(offset for _, offset in own) < 32]
    return sum(16 for own in streams for name, _ in own if "128" in name and not name.startswith("@"))


def units(blocks: Iterable[Block]) -> dict[str, int]:
    """How many instructions go to each unit with a throughput of its own; packed pairs count as two."""
    counts = dict.fromkeys(("fma", "imad", "alu", "xu", "fp64"), 0)
    for name, number in count(blocks).items():
        if name in _UNITS:
            counts[_UNITS[name]] += number
        elif name in _PAIRS:
            counts["fma"] += 2 * number
    return counts


_PAIRS = ("FADD2", "FMUL2", "FFMA2")
# "fma": single precision. "imad": integer multiply-add, a part of the same unit. "alu": integer, logic, comparison,
# selection. "xu": roots, reciprocals, conversions. What is missing (memory, control, uniform registers) is only issued.
_UNITS: Mapping[str, str] = {
    **dict.fromkeys(("FADD", "FMUL", "FFMA", "FADD32I", "FMUL32I", "FFMA32I", "HADD2", "HFMA2", "HMUL2"), "fma"),
    **dict.fromkeys(("IMAD", "IMUL"), "imad"),
    **dict.fromkeys(
        (
            *("IADD3", "IADD", "LOP3", "SHF", "LEA", "ISETP", "FSETP", "SEL", "FSEL", "FMNMX", "IMNMX", "VIADD", "LOP"),
            *("PRMT", "MOV", "IABS", "FCHK", "F2FP", "I2FP", "PLOP3", "FMNMX3", "VIMNMX", "VIADDMNMX", "SGXT", "P2R"),
        ),
        "alu",
    ),
    **dict.fromkeys(("MUFU", "I2F", "F2I", "F2F", "I2I", "FRND", "POPC", "FLO", "BREV"), "xu"),
    **dict.fromkeys(("DADD", "DMUL", "DFMA", "DSETP", "DMNMX"), "fp64"),
}


def _blocks(lines: Sequence[str]) -> list[Block]:
    blocks: list[Block] = [Block()]
    places: dict[str, int] = {}
    jumps: list[tuple[int, str]] = []
    falls = True
    for line in lines:
        label = _LABEL.match(line.strip())
        instruction = _INSTRUCTION.search(line)
        if label:
            if blocks[-1].instructions or not falls:
                if falls:
                    blocks[-1].successors.append(len(blocks))
                blocks.append(Block())
                falls = True
            places[label[1]] = len(blocks) - 1
        elif instruction:
            if not falls:
                blocks.append(Block())
                falls = True
            text = instruction[1]
            blocks[-1].instructions.append(text)
            name, target = opcode(text).partition(".")[0], _TARGET.search(text)
            if (name in _JUMPS and target) or name in _ENDS:
                if target and name in _JUMPS:
                    jumps.append((len(blocks) - 1, target[1]))
                if _conditional(text):
                    blocks[-1].successors.append(len(blocks))
                    blocks.append(Block())
                else:
                    falls = False
    for block, label_name in jumps:
        if label_name in places:
            blocks[block].successors.append(places[label_name])
    for block_ in blocks:
        block_.successors = [b for b in block_.successors if b < len(blocks)]
    return blocks


def _conditional(instruction: str) -> bool:
    predicated = instruction.startswith("@") and not instruction.startswith(("@PT", "@UPT"))
    return predicated or ".DIV" in opcode(instruction) or bool(re.search(r"^\S+ !?U?P\d", instruction))


def _backward_edges(blocks: Sequence[Block]) -> list[tuple[int, int]]:
    edges: list[tuple[int, int]] = []
    state = [0] * len(blocks)
    stack: list[tuple[int, Iterator[int]]] = [(0, iter(blocks[0].successors))]
    state[0] = 1
    while stack:
        block, following = stack[-1]
        for successor in following:
            if state[successor] == 1:
                edges.append((block, successor))
            elif state[successor] == 0:
                state[successor] = 1
                stack.append((successor, iter(blocks[successor].successors)))
                break
        else:
            state[block] = 2
            stack.pop()
    return edges


def _loop(blocks: Sequence[Block], tail: int, head: int) -> set[int]:
    before: dict[int, list[int]] = {}
    for b, block in enumerate(blocks):
        for successor in block.successors:
            before.setdefault(successor, []).append(b)
    inside, waiting = {head}, [tail]
    while waiting:
        b = waiting.pop()
        if b not in inside:
            inside.add(b)
            waiting += before.get(b, [])
    return inside


def _all(blocks: Sequence[Block]) -> set[int]:
    return set(range(len(blocks)))


def _exits(block: Block) -> bool:
    return bool(block.instructions) and opcode(block.instructions[-1]).partition(".")[0] in _ENDS
