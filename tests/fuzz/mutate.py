"""Changes to a valid input: to its bytes, to its JSON values, to the values of its TOML, to its binary header."""

from __future__ import annotations

import copy
import json
import random
import re
import struct
from typing import Any

NUMBERS = (0, -1, 1, 2**31, 2**63, -(2**63), 10**30, 0.0, -0.0, 1e-320, 1e308, -1e308, 0.5, float("nan"), float("inf"))
TEXTS = (
    "",
    " ",
    "\0",
    "\x1b[2J\x1b]0;title\x07",
    "\u202egnp.exe",
    "../../etc/passwd",
    "=1+1",
    "a" * 10_000,
    "\ud800",
    "</script>",
    "/dev/zero",
    "None",
    "nan",
    "1e999",
    "9" * 5000,
    "<!-- delta-suite -->",
)

NESTED = "nested"
"""A text that stands for a deeply nested value until the document is written."""

RAW_NUMBERS = ("1" * 5000, "1e999", "-1e999", "NaN", "Infinity", "-0", "1" + "0" * 400, "0x10", "1_000", "true", "null")
"""Numbers as they may be written, which Python could not hold or would not write."""

BYTES = (b"\0", b"\xff", b"\xfe\xff", b"\xef\xbb\xbf", b"\n", b"\r", b"[" * 3000, b"{" * 3000, b'"', b"'''", b"\\u0000")


def mutate_bytes(content: bytes, rng: random.Random) -> bytes:
    """Flip, insert, delete, repeat or cut bytes."""
    changed = bytearray(content)
    for _ in range(rng.choice((1, 1, 2, 4))):
        at = rng.randrange(len(changed) + 1)
        match rng.randrange(6):
            case 0 if at < len(changed):
                changed[at] ^= 1 << rng.randrange(8)
            case 1:
                changed[at:at] = rng.choice(BYTES)
            case 2:
                del changed[at : at + rng.choice((1, 2, 16, 256))]
            case 3:
                changed[at:at] = changed[at : at + rng.choice((1, 8, 64, 512))]
            case 4:
                del changed[at:]
            case _:
                changed[at : at + 8] = rng.randbytes(8)
    return bytes(changed)


def mutate_json(content: bytes, rng: random.Random) -> bytes:
    """Change one to three places of a JSON document, and now and then its bytes."""
    if rng.random() < 0.15:
        return mutate_bytes(content, rng)
    value = json.loads(content)
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        value = mutate_value(value, rng)
    text = json.dumps(value).replace(f'"{NESTED}"', _nested(rng))
    if rng.random() < 0.1:
        text = re.sub(r"(?<=[:\[, ])-?\d+(\.\d+)?", lambda match: _sometimes(match[0], rng), text)
    return text.encode("utf-8", "surrogatepass")


def _sometimes(number: str, rng: random.Random) -> str:
    return rng.choice(RAW_NUMBERS) if rng.random() < 0.02 else number


def mutate_value(value: Any, rng: random.Random) -> Any:
    """Return a JSON value with one place changed."""
    changed = copy.deepcopy(value)
    places = list(_places(changed))
    if not places:
        return _odd(rng, changed)
    holder, key = rng.choice(places)
    match rng.randrange(8):
        case 0:
            del holder[key]
        case 1 if isinstance(holder, dict):
            holder[rng.choice((str(key) + "x", "schema", *TEXTS))] = holder.pop(key)
        case 2 if isinstance(holder, list):
            holder.insert(key, copy.deepcopy(holder[key]))
        case 3:
            other, name = rng.choice(places)
            try:
                holder[key] = copy.deepcopy(other[name])
            except (KeyError, IndexError):
                holder[key] = None
        case 4 if isinstance(holder[key], int | float) and not isinstance(holder[key], bool):
            holder[key] = holder[key] * rng.choice((-1, 0, 2, 1e-9, 1e9, 1.001)) + rng.choice((0, 1, -1))
        case _:
            holder[key] = _odd(rng, holder[key])
    return changed


def _places(value: Any) -> Any:
    """Yield each container of a JSON value with each of its keys."""
    keys = value if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ()
    for key in keys:
        yield value, key
        yield from _places(value[key])


def _odd(rng: random.Random, before: Any) -> Any:
    kinds = (rng.choice(NUMBERS), rng.choice(TEXTS), None, True, False, [], {}, NESTED, [before], {"x": before})
    return rng.choice(kinds)


def _nested(rng: random.Random) -> str:
    depth, (opening, closing) = rng.choice((3, 90, 400, 5000)), rng.choice((("[", "]"), ('{"a":', "}")))
    return f"{opening * depth}1{closing * depth}"


_TOML_VALUE = re.compile(r"(?<== )(?:\"[^\"\n]*\"|[^\"\n]+)$", re.MULTILINE)
TOML_VALUES = (
    *RAW_NUMBERS,
    "9223372036854775807",
    "-9223372036854775808",
    "1e308",
    "inf",
    "nan",
    "true",
    '""',
    '"a"',
    '"C"',
    '"layers:0-1000000000"',
    '"layers:5-2"',
    '"layer:-1"',
    '"each"',
    '"random_directions"',
    '"\\u001b[31m"',
    "[]",
    "[1, 2]",
    '["C", "E"]',
    "{}",
    "{ metric = 1 }",
    "1979-05-27",
    "[" * 2000,
    '"""\nlong\n"""',
    '"' + "x" * 20_000 + '"',
)


def mutate_toml(content: bytes, rng: random.Random) -> bytes:
    """Change values, lines or bytes of a TOML document."""
    text = content.decode()
    match rng.randrange(8):
        case 0:
            return mutate_bytes(content, rng)
        case 1:
            lines = text.splitlines()
            at = rng.randrange(len(lines))
            del lines[at : at + rng.choice((1, 1, 2, 5))]
            return "\n".join(lines).encode()
        case 2:
            lines = text.splitlines()
            lines.insert(rng.randrange(len(lines)), rng.choice(lines))
            return "\n".join(lines).encode()
        case 3:
            words = re.findall(r"\w+", text)
            first, second = rng.choice(words), rng.choice(words)
            return re.sub(rf"\b{first}\b", second, text, count=rng.choice((0, 1))).encode()
    values = list(_TOML_VALUE.finditer(text))
    for match in sorted(rng.sample(values, min(len(values), rng.choice((1, 1, 2)))), key=lambda m: -m.start()):
        value = rng.choice((*TOML_VALUES, rng.choice(values)[0]))
        text = text[: match.start()] + value + text[match.end() :]
    return text.encode("utf-8", "surrogatepass")


def mutate_safetensors(content: bytes, rng: random.Random) -> bytes:
    """Change the JSON header of a safetensors file, its length, or its bytes."""
    length = int.from_bytes(content[:8], "little")
    header, body = content[8 : 8 + length], content[8 + length :]
    match rng.randrange(6):
        case 0:
            return mutate_bytes(content, rng)
        case 1:
            return struct.pack("<Q", rng.choice((0, 1, length + 1, 2**40, 2**63, 2**64 - 1))) + content[8:]
        case 2:
            damaged = bytearray(body)
            for _ in range(rng.choice((1, 4, 64))):
                at = rng.randrange(max(1, len(damaged) - 4))
                damaged[at : at + 4] = struct.pack("<f", rng.choice((float("nan"), float("inf"), -1.0, 1e30, 0.0, 2.0)))
            return content[: 8 + length] + bytes(damaged)
    changed = mutate_json(header, rng)
    return struct.pack("<Q", len(changed)) + changed + body


def mutate_gguf(content: bytes, rng: random.Random) -> bytes:
    """Change integers and bytes where the header of a GGUF file is."""
    if rng.random() < 0.2:
        return mutate_bytes(content, rng)
    changed = bytearray(content)
    header = min(len(changed) - 8, 2000 if rng.random() < 0.7 else 12_000)
    for _ in range(rng.choice((1, 1, 2))):
        at = rng.randrange(header)
        width = rng.choice((1, 4, 4, 8))
        value = rng.choice((0, 1, 2, 3, 8, 9, 255, 2**31 - 1, 2**32 - 1, 2**63, 2**64 - 1, rng.getrandbits(64)))
        changed[at : at + width] = (value & ((1 << (8 * width)) - 1)).to_bytes(width, "little")
    return bytes(changed)
