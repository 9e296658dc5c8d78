"""Why an attempt failed: the words in the logs of its ranks that say most about it.

Ranks that only lost their peer say so too, often first; a cause goes before its consequences. What
ranks print when one fails is written in `parallel.watch`.
"""

import re
from collections.abc import Iterator, Sequence
from pathlib import Path

READ = 1 << 20  # bytes at each end of a log that are looked at
CHAINED = ("During handling of the above", "The above exception was the direct cause")
RANK = r"^\[rank (\d+)\] ?"
COLLECTIVE = re.compile(
    r"gloo|nccl|Dist(Backend|Network|Store)Error|TCPStore|Connection (closed|reset)|Broken pipe",
    re.IGNORECASE,
)
# From what says most to what says least; an error of a collective comes last of all.
SAID = (
    re.compile(r"^(pretrain: |Fatal Python error: )"),
    re.compile(r"^rank \d+ failed at "),
    re.compile(r"^ranks? [\d, ]+ (ended or was killed|did not join|was ended by) ?"),
    re.compile(r"^(a collective took longer|rank \d+ (ended|failed)) "),
    re.compile(r"^(srun|slurmstepd): error: "),
)


def first_words(logs: Sequence[Path]) -> tuple[str, Path] | None:
    """What the logs of one attempt say of its end, and where; None if they say nothing."""
    found: list[tuple[int, float, str, Path]] = []
    for path in logs:
        for weight, text in _told(_lines(path)):
            found.append((weight, path.stat().st_mtime, text, path))
    if not found:
        return None
    _, _, text, path = min(found)
    return text, path


def _told(lines: list[str]) -> Iterator[tuple[int, str]]:
    """Sentences about an error, with how little each says; of a kind the first."""
    seen: set[int] = set()
    for number, line in enumerate(lines):
        rank = re.match(RANK, line)
        if re.sub(RANK, "", line).startswith("Traceback (most recent call last)"):
            error = _error(lines[number:])
            own = f"rank {rank.group(1)}: {error}" if rank else error
            weight = len(SAID) + 2 if COLLECTIVE.search(error) else 0 if rank else 1
        else:
            kinds = [k for k, pattern in enumerate(SAID) if pattern.match(line)]
            if not kinds:
                continue
            own, weight = line, 2 + kinds[0]
        if weight not in seen:
            seen.add(weight)
            yield weight, own


def _error(lines: list[str]) -> str:
    """The line that names the exception of a traceback, of a chain that of the last."""
    plain = [re.sub(RANK, "", line) for line in lines]
    error = ""
    for number, line in enumerate(plain[1:], start=1):
        if error and line and not line.startswith(CHAINED):
            break
        if line.startswith(CHAINED):
            follows = [text for text in plain[number + 1 :] if text][:1]
            return _error(plain[plain.index(follows[0], number) :]) if follows else error
        if line and not line[0].isspace() and not error:
            error = line
    return error or plain[0]


def _lines(path: Path) -> list[str]:
    """Of both ends of a log; a long one is mostly lines of training."""
    with path.open("rb") as file:
        text = file.read(READ)
        size = path.stat().st_size
        if size > len(text):
            file.seek(max(len(text), size - READ))
            text += b"\n" + file.read(READ)
    return text.decode(errors="replace").splitlines()
