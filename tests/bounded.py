"""What msgspec types admit, read off their annotations: parts without a bound, random values, values just outside."""

import math
import random
from collections.abc import Iterator
from typing import Any

import msgspec
from msgspec import inspect

FLOATS_OUTSIDE = (math.nan, math.inf, -math.inf, -1.0)


def unbounded(kind: Any) -> list[str]:
    """Where, below ``kind``, a number, a text or a list has no bound. Bytes have that of their frame."""
    return sorted(set(_unbounded(inspect.type_info(kind), "", ())))


def _unbounded(info: inspect.Type, path: str, above: tuple[Any, ...]) -> Iterator[str]:
    match info:
        case inspect.UnionType(types=types):
            for each in types:
                yield from _unbounded(each, path, above)
        case inspect.StructType(cls=cls, fields=fields):
            if cls not in above:
                for field in fields:
                    yield from _unbounded(field.type, f"{path}.{cls.__name__}.{field.name}", (*above, cls))
        case inspect.IntType(ge=ge, gt=gt, le=le, lt=lt):
            # 64 bits without a sign are what msgpack holds; msgspec takes no such bound.
            if (ge is None and gt is None) or (le is None and lt is None and "igest" not in path):
                yield path
        case inspect.FloatType(ge=ge, gt=gt, le=le, lt=lt):
            if (ge is None and gt is None) or (le is None and lt is None):
                yield path
        case inspect.StrType(max_length=limit):
            if limit is None and not path.endswith("Member.engine"):  # by its pattern, in __post_init__
                yield path
        case inspect.VarTupleType(item_type=item, max_length=limit):
            if limit is None:
                yield path
            yield from _unbounded(item, f"{path}[]", above)
        case inspect.TupleType(item_types=items):
            for number, item in enumerate(items):
                yield from _unbounded(item, f"{path}[{number}]", above)
        case inspect.DictType(key_type=key, value_type=value, max_length=limit):
            if limit is None:
                yield path
            yield from _unbounded(key, f"{path}{{key}}", above)
            yield from _unbounded(value, f"{path}{{}}", above)
        case inspect.BytesType() | inspect.BoolType() | inspect.LiteralType() | inspect.NoneType():
            pass
        case _:
            raise TypeError(f"{path}: {info}")


def value(kind: Any, chance: random.Random) -> Any:
    """A random value that ``kind`` admits, in builtins as the wire has it; often on a bound."""
    return _value(inspect.type_info(kind), chance, "")


def _value(info: inspect.Type, chance: random.Random, name: str) -> Any:
    match info:
        case inspect.UnionType(types=types):
            return _value(chance.choice(types), chance, name)
        case inspect.StructType(cls=cls, fields=fields, array_like=array_like, tag_field=tag_field, tag=tag):
            if cls.__name__ == "Member":
                engine = chance.choice(["", "e0", "a" * 128, "A.b_c-9"])
                return ["inference" if engine else "trainer", engine, chance.choice([0, 3, 65535])]
            values = {field.encode_name: _value(field.type, chance, field.name) for field in fields}
            if array_like:
                return list(values.values())
            return values if tag_field is None else {tag_field: tag, **values}
        case inspect.IntType():
            low, high = _ends(info, 1, 2**64 - 1)
            return chance.choice([low, high, chance.randint(low, high)])
        case inspect.FloatType():
            low, high = _ends(info, 1e-9, 1e9)
            return chance.choice([low, high, chance.uniform(low, high)])
        case inspect.StrType(max_length=limit):
            text = chance.choice(["", "plain", "Größe ≥ 1 🙂", "\x1b[2J\n\u202e\x00", "x" * 5000, "\\ud800"])
            return text[: 32 if limit is None else limit]
        case inspect.VarTupleType(item_type=item, min_length=least):
            return [_value(item, chance, name) for _ in range(chance.randint(least or 0, 3))]
        case inspect.TupleType(item_types=items):
            return [_value(item, chance, name) for item in items]
        case inspect.DictType(key_type=key, value_type=of):
            return {_value(key, chance, name): _value(of, chance, name) for _ in range(chance.randint(0, 3))}
        case inspect.LiteralType(values=values):
            return chance.choice(values)
        case inspect.BytesType():
            return chance.randbytes(chance.choice([0, 1, 300]))
        case inspect.BoolType():
            return chance.random() < 0.5
        case inspect.NoneType():
            return None
        case _:
            raise TypeError(f"{name}: {info}")


def outside(kind: Any, chance: random.Random) -> Iterator[tuple[str, Any]]:
    """Values as ``value`` makes them, each with one number that is not admitted; and the path of that number."""
    info = inspect.type_info(kind)
    whole = _value(info, chance, "")
    yield from _outside(info, whole, "")


def _outside(info: inspect.Type, good: Any, path: str) -> Iterator[tuple[str, Any]]:
    match info:
        case inspect.StructType(fields=fields, array_like=array_like, cls=cls):
            for number, field in enumerate(fields):
                place: Any = number if array_like else field.encode_name
                for where, bad in _outside(field.type, good[place], f"{path}.{cls.__name__}.{field.name}"):
                    yield where, ([*good[:place], bad, *good[place + 1 :]] if array_like else good | {place: bad})
        case inspect.IntType(le=le, lt=lt):
            low, _ = _ends(info, 1, 0)
            yield from ((path, bad) for bad in (low - 1, -(2**63)))
            if le is not None or lt is not None:
                yield from ((path, bad) for bad in (_ends(info, 1, 0)[1] + 1, 2**64 - 1))
        case inspect.FloatType():
            yield from ((path, bad) for bad in (*FLOATS_OUTSIDE, 1e300))
        case inspect.TupleType(item_types=items):
            for number, item in enumerate(items):
                for where, bad in _outside(item, good[number], f"{path}[{number}]"):
                    yield where, [*good[:number], bad, *good[number + 1 :]]
        case inspect.VarTupleType(item_type=item):
            for where, bad in _outside(item, good[0], f"{path}[]") if good else ():
                yield where, [bad, *good[1:]]
        case inspect.DictType(value_type=of):
            for key in list(good)[:1]:
                for where, bad in _outside(of, good[key], f"{path}{{}}"):
                    yield where, good | {key: bad}
        case _:
            pass


def _ends(info: Any, step: Any, top: Any) -> tuple[Any, Any]:
    low = info.ge if info.ge is not None else info.gt + step if info.gt is not None else 0
    high = info.le if info.le is not None else info.lt - step if info.lt is not None else top
    return low, high


def packed(wire: Any) -> bytes:
    """Builtins as a peer would send them."""
    return msgspec.msgpack.encode(wire)
