"""What clients compiled against stays where it is: names, numbers and types of the public protos, as once recorded.

`protos/contract.txt` only grows. A line that is missing from it is printed, to be added; one that is gone from the
protos is a broken client.
"""

from collections.abc import Iterator
from pathlib import Path

from google.protobuf.descriptor import EnumDescriptor, FieldDescriptor, FileDescriptor, MethodDescriptor

from protos import admin_pb2, inference_pb2

RECORD = Path(__file__).resolve().parents[2] / "protos" / "contract.txt"
_TYPES = {number: name for name, number in vars(FieldDescriptor).items() if name.startswith("TYPE_")}


def lines_of(file: FileDescriptor) -> Iterator[str]:
    for service in file.services_by_name.values():
        yield from (_method(method) for method in service.methods)
    for message in file.message_types_by_name.values():
        yield from (_field(field) for field in message.fields)
        for nested in message.nested_types:
            yield from (_field(field) for field in nested.fields)
    for enum in file.enum_types_by_name.values():
        yield from _values(enum)


def _method(method: MethodDescriptor) -> str:
    answer = f"stream {method.output_type.full_name}" if method.server_streaming else method.output_type.full_name
    return f"rpc {method.full_name} {method.input_type.full_name} -> {answer}"


def _field(field: FieldDescriptor) -> str:
    kind = _TYPES[field.type].removeprefix("TYPE_").lower()
    of = field.message_type or field.enum_type
    name = f"{kind} {of.full_name}" if of is not None else kind
    presence = "repeated " if field.is_repeated else "optional " if field.has_presence else ""
    return f"field {field.full_name} = {field.number} {presence}{name}"


def _values(enum: EnumDescriptor) -> Iterator[str]:
    return (f"value {enum.full_name}.{value.name} = {value.number}" for value in enum.values)


def test_the_public_contract_only_grows() -> None:
    recorded = set(RECORD.read_text(encoding="utf-8").splitlines())
    now = {line for file in (inference_pb2.DESCRIPTOR, admin_pb2.DESCRIPTOR) for line in lines_of(file)}
    assert recorded - now == set(), "clients rely on it"
    assert now - recorded == set(), "new: add these lines to protos/contract.txt"
