import datetime

from google.protobuf import timestamp_pb2 as _timestamp_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class AdapterState(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    ADAPTER_STATE_UNSPECIFIED: _ClassVar[AdapterState]
    ADAPTER_STATE_LOADED: _ClassVar[AdapterState]
    ADAPTER_STATE_ACTIVE: _ClassVar[AdapterState]
    ADAPTER_STATE_RETIRING: _ClassVar[AdapterState]
ADAPTER_STATE_UNSPECIFIED: AdapterState
ADAPTER_STATE_LOADED: AdapterState
ADAPTER_STATE_ACTIVE: AdapterState
ADAPTER_STATE_RETIRING: AdapterState

class AdapterFile(_message.Message):
    __slots__ = ("name", "size_bytes", "sha256")
    NAME_FIELD_NUMBER: _ClassVar[int]
    SIZE_BYTES_FIELD_NUMBER: _ClassVar[int]
    SHA256_FIELD_NUMBER: _ClassVar[int]
    name: str
    size_bytes: int
    sha256: str
    def __init__(self, name: _Optional[str] = ..., size_bytes: _Optional[int] = ..., sha256: _Optional[str] = ...) -> None: ...

class AdapterProbe(_message.Message):
    __slots__ = ("token_ids", "logprobs", "base_logprobs")
    TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    BASE_LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    token_ids: _containers.RepeatedScalarFieldContainer[int]
    logprobs: _containers.RepeatedScalarFieldContainer[float]
    base_logprobs: _containers.RepeatedScalarFieldContainer[float]
    def __init__(self, token_ids: _Optional[_Iterable[int]] = ..., logprobs: _Optional[_Iterable[float]] = ..., base_logprobs: _Optional[_Iterable[float]] = ...) -> None: ...

class Adapter(_message.Message):
    __slots__ = ("run_id", "policy_version", "sha256", "state", "rank", "size_bytes", "create_time", "active_request_count")
    RUN_ID_FIELD_NUMBER: _ClassVar[int]
    POLICY_VERSION_FIELD_NUMBER: _ClassVar[int]
    SHA256_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    RANK_FIELD_NUMBER: _ClassVar[int]
    SIZE_BYTES_FIELD_NUMBER: _ClassVar[int]
    CREATE_TIME_FIELD_NUMBER: _ClassVar[int]
    ACTIVE_REQUEST_COUNT_FIELD_NUMBER: _ClassVar[int]
    run_id: str
    policy_version: int
    sha256: str
    state: AdapterState
    rank: int
    size_bytes: int
    create_time: _timestamp_pb2.Timestamp
    active_request_count: int
    def __init__(self, run_id: _Optional[str] = ..., policy_version: _Optional[int] = ..., sha256: _Optional[str] = ..., state: _Optional[_Union[AdapterState, str]] = ..., rank: _Optional[int] = ..., size_bytes: _Optional[int] = ..., create_time: _Optional[_Union[datetime.datetime, _timestamp_pb2.Timestamp, _Mapping]] = ..., active_request_count: _Optional[int] = ...) -> None: ...

class BeginPushRequest(_message.Message):
    __slots__ = ("request_id", "run_id", "policy_version", "base_model_sha256", "rank", "target_modules", "files", "probes", "differs_from_base", "epoch")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    RUN_ID_FIELD_NUMBER: _ClassVar[int]
    POLICY_VERSION_FIELD_NUMBER: _ClassVar[int]
    BASE_MODEL_SHA256_FIELD_NUMBER: _ClassVar[int]
    RANK_FIELD_NUMBER: _ClassVar[int]
    TARGET_MODULES_FIELD_NUMBER: _ClassVar[int]
    FILES_FIELD_NUMBER: _ClassVar[int]
    PROBES_FIELD_NUMBER: _ClassVar[int]
    DIFFERS_FROM_BASE_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    run_id: str
    policy_version: int
    base_model_sha256: str
    rank: int
    target_modules: _containers.RepeatedScalarFieldContainer[str]
    files: _containers.RepeatedCompositeFieldContainer[AdapterFile]
    probes: _containers.RepeatedCompositeFieldContainer[AdapterProbe]
    differs_from_base: bool
    epoch: int
    def __init__(self, request_id: _Optional[str] = ..., run_id: _Optional[str] = ..., policy_version: _Optional[int] = ..., base_model_sha256: _Optional[str] = ..., rank: _Optional[int] = ..., target_modules: _Optional[_Iterable[str]] = ..., files: _Optional[_Iterable[_Union[AdapterFile, _Mapping]]] = ..., probes: _Optional[_Iterable[_Union[AdapterProbe, _Mapping]]] = ..., differs_from_base: bool = ..., epoch: _Optional[int] = ...) -> None: ...

class BeginPushResponse(_message.Message):
    __slots__ = ("upload_id", "committed_offset", "max_chunk_bytes", "stream")
    UPLOAD_ID_FIELD_NUMBER: _ClassVar[int]
    COMMITTED_OFFSET_FIELD_NUMBER: _ClassVar[int]
    MAX_CHUNK_BYTES_FIELD_NUMBER: _ClassVar[int]
    STREAM_FIELD_NUMBER: _ClassVar[int]
    upload_id: str
    committed_offset: int
    max_chunk_bytes: int
    stream: int
    def __init__(self, upload_id: _Optional[str] = ..., committed_offset: _Optional[int] = ..., max_chunk_bytes: _Optional[int] = ..., stream: _Optional[int] = ...) -> None: ...

class PushChunksRequest(_message.Message):
    __slots__ = ("upload_id", "offset", "data", "crc32", "stream")
    UPLOAD_ID_FIELD_NUMBER: _ClassVar[int]
    OFFSET_FIELD_NUMBER: _ClassVar[int]
    DATA_FIELD_NUMBER: _ClassVar[int]
    CRC32_FIELD_NUMBER: _ClassVar[int]
    STREAM_FIELD_NUMBER: _ClassVar[int]
    upload_id: str
    offset: int
    data: bytes
    crc32: int
    stream: int
    def __init__(self, upload_id: _Optional[str] = ..., offset: _Optional[int] = ..., data: _Optional[bytes] = ..., crc32: _Optional[int] = ..., stream: _Optional[int] = ...) -> None: ...

class PushChunksResponse(_message.Message):
    __slots__ = ("committed_offset",)
    COMMITTED_OFFSET_FIELD_NUMBER: _ClassVar[int]
    committed_offset: int
    def __init__(self, committed_offset: _Optional[int] = ...) -> None: ...

class CommitPushRequest(_message.Message):
    __slots__ = ("request_id", "upload_id", "epoch")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    UPLOAD_ID_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    upload_id: str
    epoch: int
    def __init__(self, request_id: _Optional[str] = ..., upload_id: _Optional[str] = ..., epoch: _Optional[int] = ...) -> None: ...

class CommitStage(_message.Message):
    __slots__ = ("name", "duration_seconds")
    NAME_FIELD_NUMBER: _ClassVar[int]
    DURATION_SECONDS_FIELD_NUMBER: _ClassVar[int]
    name: str
    duration_seconds: float
    def __init__(self, name: _Optional[str] = ..., duration_seconds: _Optional[float] = ...) -> None: ...

class CommitPushResponse(_message.Message):
    __slots__ = ("adapter", "stages", "mean_abs_dlogp")
    ADAPTER_FIELD_NUMBER: _ClassVar[int]
    STAGES_FIELD_NUMBER: _ClassVar[int]
    MEAN_ABS_DLOGP_FIELD_NUMBER: _ClassVar[int]
    adapter: Adapter
    stages: _containers.RepeatedCompositeFieldContainer[CommitStage]
    mean_abs_dlogp: float
    def __init__(self, adapter: _Optional[_Union[Adapter, _Mapping]] = ..., stages: _Optional[_Iterable[_Union[CommitStage, _Mapping]]] = ..., mean_abs_dlogp: _Optional[float] = ...) -> None: ...

class ActivateAdapterRequest(_message.Message):
    __slots__ = ("request_id", "run_id", "policy_version", "expected_run_id", "expected_policy_version", "epoch")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    RUN_ID_FIELD_NUMBER: _ClassVar[int]
    POLICY_VERSION_FIELD_NUMBER: _ClassVar[int]
    EXPECTED_RUN_ID_FIELD_NUMBER: _ClassVar[int]
    EXPECTED_POLICY_VERSION_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    run_id: str
    policy_version: int
    expected_run_id: str
    expected_policy_version: int
    epoch: int
    def __init__(self, request_id: _Optional[str] = ..., run_id: _Optional[str] = ..., policy_version: _Optional[int] = ..., expected_run_id: _Optional[str] = ..., expected_policy_version: _Optional[int] = ..., epoch: _Optional[int] = ...) -> None: ...

class ActivateAdapterResponse(_message.Message):
    __slots__ = ("policy_version", "previous_policy_version")
    POLICY_VERSION_FIELD_NUMBER: _ClassVar[int]
    PREVIOUS_POLICY_VERSION_FIELD_NUMBER: _ClassVar[int]
    policy_version: int
    previous_policy_version: int
    def __init__(self, policy_version: _Optional[int] = ..., previous_policy_version: _Optional[int] = ...) -> None: ...

class RollbackAdapterRequest(_message.Message):
    __slots__ = ("request_id", "run_id", "expected_policy_version", "epoch")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    RUN_ID_FIELD_NUMBER: _ClassVar[int]
    EXPECTED_POLICY_VERSION_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    run_id: str
    expected_policy_version: int
    epoch: int
    def __init__(self, request_id: _Optional[str] = ..., run_id: _Optional[str] = ..., expected_policy_version: _Optional[int] = ..., epoch: _Optional[int] = ...) -> None: ...

class RollbackAdapterResponse(_message.Message):
    __slots__ = ("policy_version",)
    POLICY_VERSION_FIELD_NUMBER: _ClassVar[int]
    policy_version: int
    def __init__(self, policy_version: _Optional[int] = ...) -> None: ...

class ListAdaptersRequest(_message.Message):
    __slots__ = ("page_size", "page_token")
    PAGE_SIZE_FIELD_NUMBER: _ClassVar[int]
    PAGE_TOKEN_FIELD_NUMBER: _ClassVar[int]
    page_size: int
    page_token: str
    def __init__(self, page_size: _Optional[int] = ..., page_token: _Optional[str] = ...) -> None: ...

class ListAdaptersResponse(_message.Message):
    __slots__ = ("adapters", "next_page_token")
    ADAPTERS_FIELD_NUMBER: _ClassVar[int]
    NEXT_PAGE_TOKEN_FIELD_NUMBER: _ClassVar[int]
    adapters: _containers.RepeatedCompositeFieldContainer[Adapter]
    next_page_token: str
    def __init__(self, adapters: _Optional[_Iterable[_Union[Adapter, _Mapping]]] = ..., next_page_token: _Optional[str] = ...) -> None: ...

class GetActiveAdapterRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class GetActiveAdapterResponse(_message.Message):
    __slots__ = ("run_id", "policy_version", "adapter")
    RUN_ID_FIELD_NUMBER: _ClassVar[int]
    POLICY_VERSION_FIELD_NUMBER: _ClassVar[int]
    ADAPTER_FIELD_NUMBER: _ClassVar[int]
    run_id: str
    policy_version: int
    adapter: Adapter
    def __init__(self, run_id: _Optional[str] = ..., policy_version: _Optional[int] = ..., adapter: _Optional[_Union[Adapter, _Mapping]] = ...) -> None: ...

class DeleteAdapterRequest(_message.Message):
    __slots__ = ("request_id", "run_id", "policy_version", "epoch")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    RUN_ID_FIELD_NUMBER: _ClassVar[int]
    POLICY_VERSION_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    run_id: str
    policy_version: int
    epoch: int
    def __init__(self, request_id: _Optional[str] = ..., run_id: _Optional[str] = ..., policy_version: _Optional[int] = ..., epoch: _Optional[int] = ...) -> None: ...

class DeleteAdapterResponse(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...
