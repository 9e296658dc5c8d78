"""Why an attempt failed: the words in the logs of its ranks that say most about it.

Ranks that only lost their peer say so too, often first; a cause goes before its consequences. What
ranks print when one fails is written in `parallel.watch`.
"""

import re
from collections.abc import Iterator, Sequence
from pathlib import Path

READ = 1 << 20  # bytes at each end of a log that are looked at
TRACEBACK = "Traceback (most recent call last)"
CHAINED = ("During handling of the above", "The above exception was the direct cause")
RANK = re.compile(r"^\[rank ?(?P<rank>\d+)\](?P<torch>:)? ?")  # `[rank 2] `; torch: `[rank2]: `
# What a rank ends with because of another: it lost its peer, or was told to end.
CONSEQUENCE = re.compile(
    r"gloo|nccl|Dist\w*Error|TCPStore|Connection (closed|reset)|Broken ?pipe"
    r"|ChildFailedError|SignalException|SIGTERM",
    re.IGNORECASE,
)
# From what says most to what says least; a traceback of a consequence comes last of all.
SAID = (
    re.compile(r"^(pretrain: |Fatal Python error: (?!Aborted)|slurmstepd: error: Detected )"),
    re.compile(r"^rank \d+ failed at "),
    re.compile(r"^ranks? [\d, ]+ (ended or was killed|did not join|was ended by (?!SIGTERM))"),
    re.compile(r"^(a collective took longer|rank \d+ (ended|failed)) "),
    re.compile(r"^(Fatal Python error: |(srun|slurmstepd): error: (?!\*\*\*|.*: Terminated$))"),
    re.compile(r"^((srun|slurmstepd): error: |rank \d+ was ended by )"),
)


def first_words(logs: Sequence[Path]) -> tuple[str, Path] | None:
    """What the logs of one attempt say of its end, and where; None if they say nothing."""
    found = [
        (weight, path.stat().st_mtime, order, text, path)
        for path in logs
        for order, (weight, text) in enumerate(_told(_lines(path)))
    ]
    return min(found)[-2:] if found else None


def _told(lines: list[str]) -> Iterator[tuple[int, str]]:
    """Sentences about an error, with how little each says."""
    for start, errors in _tracebacks(lines):
        # why: with `[rank 2] ` parallel.watch marks what is no consequence of another's failure.
        ours = start is not None and not start["torch"]
        own = [error for error in errors if not CONSEQUENCE.search(error)]
        if ours or errors[0] in own:
            weight, error = 0 if ours else 1, (own or errors)[-1]
        else:
            weight, error = len(SAID) + 2, errors[0]
        yield weight, f"rank {start['rank']}: {error}" if start else error
    for weight, pattern in enumerate(SAID, start=2):
        yield from ((weight, line) for line in lines if pattern.match(line))


def _tracebacks(lines: list[str]) -> list[tuple[re.Match[str] | None, list[str]]]:
    """How the lines of each begin, and its exceptions; a chain is one, first to last."""
    found: list[tuple[re.Match[str] | None, list[str]]] = []
    inside = chained = False
    for line in lines:
        plain = RANK.sub("", line)
        if plain.startswith(CHAINED):
            chained = bool(found)
        elif plain.startswith(TRACEBACK):
            if not chained:
                found.append((RANK.match(line), []))
            inside, chained = True, False
        elif inside and plain and not plain[0].isspace():
            found[-1][1].append(plain)
            inside = False
    return [(start, errors or [TRACEBACK]) for start, errors in found]


def _lines(path: Path) -> list[str]:
    """Of both ends of a log; a long one is mostly lines of training."""
    with path.open("rb") as file:
        text = file.read(READ)
        size = path.stat().st_size
        if size > len(text):
            file.seek(max(len(text), size - READ))
            text += b"\n" + file.read(READ)
    return text.decode(errors="replace").splitlines()
