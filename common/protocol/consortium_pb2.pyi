from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class Nothing(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class SiteName(_message.Message):
    __slots__ = ("name",)
    NAME_FIELD_NUMBER: _ClassVar[int]
    name: str
    def __init__(self, name: _Optional[str] = ...) -> None: ...

class Envelope(_message.Message):
    __slots__ = ("envelope",)
    ENVELOPE_FIELD_NUMBER: _ClassVar[int]
    envelope: bytes
    def __init__(self, envelope: _Optional[bytes] = ...) -> None: ...

class Frame(_message.Message):
    __slots__ = ("seq", "ack", "envelope", "code", "run", "ticket")
    SEQ_FIELD_NUMBER: _ClassVar[int]
    ACK_FIELD_NUMBER: _ClassVar[int]
    ENVELOPE_FIELD_NUMBER: _ClassVar[int]
    CODE_FIELD_NUMBER: _ClassVar[int]
    RUN_FIELD_NUMBER: _ClassVar[int]
    TICKET_FIELD_NUMBER: _ClassVar[int]
    seq: int
    ack: int
    envelope: bytes
    code: str
    run: str
    ticket: bytes
    def __init__(self, seq: _Optional[int] = ..., ack: _Optional[int] = ..., envelope: _Optional[bytes] = ..., code: _Optional[str] = ..., run: _Optional[str] = ..., ticket: _Optional[bytes] = ...) -> None: ...

class HubFrame(_message.Message):
    __slots__ = ("run", "site", "exchange", "envelope", "code", "ticket")
    RUN_FIELD_NUMBER: _ClassVar[int]
    SITE_FIELD_NUMBER: _ClassVar[int]
    EXCHANGE_FIELD_NUMBER: _ClassVar[int]
    ENVELOPE_FIELD_NUMBER: _ClassVar[int]
    CODE_FIELD_NUMBER: _ClassVar[int]
    TICKET_FIELD_NUMBER: _ClassVar[int]
    run: str
    site: str
    exchange: int
    envelope: bytes
    code: str
    ticket: bytes
    def __init__(self, run: _Optional[str] = ..., site: _Optional[str] = ..., exchange: _Optional[int] = ..., envelope: _Optional[bytes] = ..., code: _Optional[str] = ..., ticket: _Optional[bytes] = ...) -> None: ...

class CertificateRequest(_message.Message):
    __slots__ = ("csr",)
    CSR_FIELD_NUMBER: _ClassVar[int]
    csr: bytes
    def __init__(self, csr: _Optional[bytes] = ...) -> None: ...

class Certificate(_message.Message):
    __slots__ = ("chain",)
    CHAIN_FIELD_NUMBER: _ClassVar[int]
    chain: bytes
    def __init__(self, chain: _Optional[bytes] = ...) -> None: ...

class EnrolmentRequest(_message.Message):
    __slots__ = ("token", "csr", "identity", "identity_proof", "officer", "supernode")
    TOKEN_FIELD_NUMBER: _ClassVar[int]
    CSR_FIELD_NUMBER: _ClassVar[int]
    IDENTITY_FIELD_NUMBER: _ClassVar[int]
    IDENTITY_PROOF_FIELD_NUMBER: _ClassVar[int]
    OFFICER_FIELD_NUMBER: _ClassVar[int]
    SUPERNODE_FIELD_NUMBER: _ClassVar[int]
    token: str
    csr: bytes
    identity: bytes
    identity_proof: bytes
    officer: bytes
    supernode: str
    def __init__(self, token: _Optional[str] = ..., csr: _Optional[bytes] = ..., identity: _Optional[bytes] = ..., identity_proof: _Optional[bytes] = ..., officer: _Optional[bytes] = ..., supernode: _Optional[str] = ...) -> None: ...

class EnrolmentReply(_message.Message):
    __slots__ = ("name", "consortium", "chain", "coordinator", "service_address", "fleet_address")
    NAME_FIELD_NUMBER: _ClassVar[int]
    CONSORTIUM_FIELD_NUMBER: _ClassVar[int]
    CHAIN_FIELD_NUMBER: _ClassVar[int]
    COORDINATOR_FIELD_NUMBER: _ClassVar[int]
    SERVICE_ADDRESS_FIELD_NUMBER: _ClassVar[int]
    FLEET_ADDRESS_FIELD_NUMBER: _ClassVar[int]
    name: str
    consortium: str
    chain: bytes
    coordinator: bytes
    service_address: str
    fleet_address: str
    def __init__(self, name: _Optional[str] = ..., consortium: _Optional[str] = ..., chain: _Optional[bytes] = ..., coordinator: _Optional[bytes] = ..., service_address: _Optional[str] = ..., fleet_address: _Optional[str] = ...) -> None: ...

class Rotation(_message.Message):
    __slots__ = ("identity", "by_old", "by_new", "by_officer")
    IDENTITY_FIELD_NUMBER: _ClassVar[int]
    BY_OLD_FIELD_NUMBER: _ClassVar[int]
    BY_NEW_FIELD_NUMBER: _ClassVar[int]
    BY_OFFICER_FIELD_NUMBER: _ClassVar[int]
    identity: bytes
    by_old: bytes
    by_new: bytes
    by_officer: bytes
    def __init__(self, identity: _Optional[bytes] = ..., by_old: _Optional[bytes] = ..., by_new: _Optional[bytes] = ..., by_officer: _Optional[bytes] = ...) -> None: ...

class MemberName(_message.Message):
    __slots__ = ("name",)
    NAME_FIELD_NUMBER: _ClassVar[int]
    name: str
    def __init__(self, name: _Optional[str] = ...) -> None: ...

class Member(_message.Message):
    __slots__ = ("name", "role", "state", "identity", "since")
    NAME_FIELD_NUMBER: _ClassVar[int]
    ROLE_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    IDENTITY_FIELD_NUMBER: _ClassVar[int]
    SINCE_FIELD_NUMBER: _ClassVar[int]
    name: str
    role: str
    state: str
    identity: bytes
    since: int
    def __init__(self, name: _Optional[str] = ..., role: _Optional[str] = ..., state: _Optional[str] = ..., identity: _Optional[bytes] = ..., since: _Optional[int] = ...) -> None: ...

class MemberList(_message.Message):
    __slots__ = ("members",)
    MEMBERS_FIELD_NUMBER: _ClassVar[int]
    members: _containers.RepeatedCompositeFieldContainer[Member]
    def __init__(self, members: _Optional[_Iterable[_Union[Member, _Mapping]]] = ...) -> None: ...

class Proposal(_message.Message):
    __slots__ = ("run", "envelope", "state")
    RUN_FIELD_NUMBER: _ClassVar[int]
    ENVELOPE_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    run: str
    envelope: bytes
    state: str
    def __init__(self, run: _Optional[str] = ..., envelope: _Optional[bytes] = ..., state: _Optional[str] = ...) -> None: ...

class Approval(_message.Message):
    __slots__ = ("run", "proposal", "signature", "declined")
    RUN_FIELD_NUMBER: _ClassVar[int]
    PROPOSAL_FIELD_NUMBER: _ClassVar[int]
    SIGNATURE_FIELD_NUMBER: _ClassVar[int]
    DECLINED_FIELD_NUMBER: _ClassVar[int]
    run: str
    proposal: str
    signature: bytes
    declined: bool
    def __init__(self, run: _Optional[str] = ..., proposal: _Optional[str] = ..., signature: _Optional[bytes] = ..., declined: bool = ...) -> None: ...

class Checkpoint(_message.Message):
    __slots__ = ("text", "cosigned")
    TEXT_FIELD_NUMBER: _ClassVar[int]
    COSIGNED_FIELD_NUMBER: _ClassVar[int]
    text: str
    cosigned: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, text: _Optional[str] = ..., cosigned: _Optional[_Iterable[str]] = ...) -> None: ...

class RunName(_message.Message):
    __slots__ = ("run",)
    RUN_FIELD_NUMBER: _ClassVar[int]
    run: str
    def __init__(self, run: _Optional[str] = ...) -> None: ...

class RunStatus(_message.Message):
    __slots__ = ("json",)
    JSON_FIELD_NUMBER: _ClassVar[int]
    json: str
    def __init__(self, json: _Optional[str] = ...) -> None: ...

class RowsRequest(_message.Message):
    __slots__ = ("run", "rows", "format")
    RUN_FIELD_NUMBER: _ClassVar[int]
    ROWS_FIELD_NUMBER: _ClassVar[int]
    FORMAT_FIELD_NUMBER: _ClassVar[int]
    run: str
    rows: int
    format: str
    def __init__(self, run: _Optional[str] = ..., rows: _Optional[int] = ..., format: _Optional[str] = ...) -> None: ...

class RowChunk(_message.Message):
    __slots__ = ("data",)
    DATA_FIELD_NUMBER: _ClassVar[int]
    data: bytes
    def __init__(self, data: _Optional[bytes] = ...) -> None: ...
