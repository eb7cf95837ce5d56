import datetime

from google.protobuf import timestamp_pb2 as _timestamp_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class RewardModelState(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    REWARD_MODEL_STATE_UNSPECIFIED: _ClassVar[RewardModelState]
    REWARD_MODEL_STATE_LOADING: _ClassVar[RewardModelState]
    REWARD_MODEL_STATE_WARM: _ClassVar[RewardModelState]
    REWARD_MODEL_STATE_SERVING: _ClassVar[RewardModelState]
    REWARD_MODEL_STATE_DRAINING: _ClassVar[RewardModelState]
REWARD_MODEL_STATE_UNSPECIFIED: RewardModelState
REWARD_MODEL_STATE_LOADING: RewardModelState
REWARD_MODEL_STATE_WARM: RewardModelState
REWARD_MODEL_STATE_SERVING: RewardModelState
REWARD_MODEL_STATE_DRAINING: RewardModelState

class LoadedRewardModel(_message.Message):
    __slots__ = ("name", "version", "model_sha256", "engine", "state", "default_model", "default_version", "active_request_count", "cache_hit_count", "cache_miss_count", "create_time")
    NAME_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    MODEL_SHA256_FIELD_NUMBER: _ClassVar[int]
    ENGINE_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    DEFAULT_MODEL_FIELD_NUMBER: _ClassVar[int]
    DEFAULT_VERSION_FIELD_NUMBER: _ClassVar[int]
    ACTIVE_REQUEST_COUNT_FIELD_NUMBER: _ClassVar[int]
    CACHE_HIT_COUNT_FIELD_NUMBER: _ClassVar[int]
    CACHE_MISS_COUNT_FIELD_NUMBER: _ClassVar[int]
    CREATE_TIME_FIELD_NUMBER: _ClassVar[int]
    name: str
    version: str
    model_sha256: str
    engine: str
    state: RewardModelState
    default_model: bool
    default_version: bool
    active_request_count: int
    cache_hit_count: int
    cache_miss_count: int
    create_time: _timestamp_pb2.Timestamp
    def __init__(self, name: _Optional[str] = ..., version: _Optional[str] = ..., model_sha256: _Optional[str] = ..., engine: _Optional[str] = ..., state: _Optional[_Union[RewardModelState, str]] = ..., default_model: bool = ..., default_version: bool = ..., active_request_count: _Optional[int] = ..., cache_hit_count: _Optional[int] = ..., cache_miss_count: _Optional[int] = ..., create_time: _Optional[_Union[datetime.datetime, _timestamp_pb2.Timestamp, _Mapping]] = ...) -> None: ...

class ScoreCacheState(_message.Message):
    __slots__ = ("item_count", "max_item_count", "size_bytes", "max_size_bytes")
    ITEM_COUNT_FIELD_NUMBER: _ClassVar[int]
    MAX_ITEM_COUNT_FIELD_NUMBER: _ClassVar[int]
    SIZE_BYTES_FIELD_NUMBER: _ClassVar[int]
    MAX_SIZE_BYTES_FIELD_NUMBER: _ClassVar[int]
    item_count: int
    max_item_count: int
    size_bytes: int
    max_size_bytes: int
    def __init__(self, item_count: _Optional[int] = ..., max_item_count: _Optional[int] = ..., size_bytes: _Optional[int] = ..., max_size_bytes: _Optional[int] = ...) -> None: ...

class RewardModelShadow(_message.Message):
    __slots__ = ("base", "candidate", "fraction", "scored_count", "dropped_count", "failed_count", "mean_difference", "mean_abs_difference", "pair_count", "agreeing_pair_count")
    BASE_FIELD_NUMBER: _ClassVar[int]
    CANDIDATE_FIELD_NUMBER: _ClassVar[int]
    FRACTION_FIELD_NUMBER: _ClassVar[int]
    SCORED_COUNT_FIELD_NUMBER: _ClassVar[int]
    DROPPED_COUNT_FIELD_NUMBER: _ClassVar[int]
    FAILED_COUNT_FIELD_NUMBER: _ClassVar[int]
    MEAN_DIFFERENCE_FIELD_NUMBER: _ClassVar[int]
    MEAN_ABS_DIFFERENCE_FIELD_NUMBER: _ClassVar[int]
    PAIR_COUNT_FIELD_NUMBER: _ClassVar[int]
    AGREEING_PAIR_COUNT_FIELD_NUMBER: _ClassVar[int]
    base: str
    candidate: str
    fraction: float
    scored_count: int
    dropped_count: int
    failed_count: int
    mean_difference: float
    mean_abs_difference: float
    pair_count: int
    agreeing_pair_count: int
    def __init__(self, base: _Optional[str] = ..., candidate: _Optional[str] = ..., fraction: _Optional[float] = ..., scored_count: _Optional[int] = ..., dropped_count: _Optional[int] = ..., failed_count: _Optional[int] = ..., mean_difference: _Optional[float] = ..., mean_abs_difference: _Optional[float] = ..., pair_count: _Optional[int] = ..., agreeing_pair_count: _Optional[int] = ...) -> None: ...

class LoadRewardModelRequest(_message.Message):
    __slots__ = ("request_id", "name", "version", "expected_sha256")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    NAME_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    EXPECTED_SHA256_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    name: str
    version: str
    expected_sha256: str
    def __init__(self, request_id: _Optional[str] = ..., name: _Optional[str] = ..., version: _Optional[str] = ..., expected_sha256: _Optional[str] = ...) -> None: ...

class LoadRewardModelResponse(_message.Message):
    __slots__ = ("model",)
    MODEL_FIELD_NUMBER: _ClassVar[int]
    model: LoadedRewardModel
    def __init__(self, model: _Optional[_Union[LoadedRewardModel, _Mapping]] = ...) -> None: ...

class UnloadRewardModelRequest(_message.Message):
    __slots__ = ("request_id", "name", "version")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    NAME_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    name: str
    version: str
    def __init__(self, request_id: _Optional[str] = ..., name: _Optional[str] = ..., version: _Optional[str] = ...) -> None: ...

class UnloadRewardModelResponse(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class SetDefaultRewardModelRequest(_message.Message):
    __slots__ = ("request_id", "name", "version", "name_only", "expected_current")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    NAME_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    NAME_ONLY_FIELD_NUMBER: _ClassVar[int]
    EXPECTED_CURRENT_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    name: str
    version: str
    name_only: bool
    expected_current: str
    def __init__(self, request_id: _Optional[str] = ..., name: _Optional[str] = ..., version: _Optional[str] = ..., name_only: bool = ..., expected_current: _Optional[str] = ...) -> None: ...

class SetDefaultRewardModelResponse(_message.Message):
    __slots__ = ("current", "previous")
    CURRENT_FIELD_NUMBER: _ClassVar[int]
    PREVIOUS_FIELD_NUMBER: _ClassVar[int]
    current: str
    previous: str
    def __init__(self, current: _Optional[str] = ..., previous: _Optional[str] = ...) -> None: ...

class SetShadowRequest(_message.Message):
    __slots__ = ("request_id", "name", "version", "base", "fraction")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    NAME_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    BASE_FIELD_NUMBER: _ClassVar[int]
    FRACTION_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    name: str
    version: str
    base: str
    fraction: float
    def __init__(self, request_id: _Optional[str] = ..., name: _Optional[str] = ..., version: _Optional[str] = ..., base: _Optional[str] = ..., fraction: _Optional[float] = ...) -> None: ...

class SetShadowResponse(_message.Message):
    __slots__ = ("shadow",)
    SHADOW_FIELD_NUMBER: _ClassVar[int]
    shadow: RewardModelShadow
    def __init__(self, shadow: _Optional[_Union[RewardModelShadow, _Mapping]] = ...) -> None: ...

class ClearShadowRequest(_message.Message):
    __slots__ = ("request_id",)
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    def __init__(self, request_id: _Optional[str] = ...) -> None: ...

class ClearShadowResponse(_message.Message):
    __slots__ = ("shadow",)
    SHADOW_FIELD_NUMBER: _ClassVar[int]
    shadow: RewardModelShadow
    def __init__(self, shadow: _Optional[_Union[RewardModelShadow, _Mapping]] = ...) -> None: ...

class ListLoadedRewardModelsRequest(_message.Message):
    __slots__ = ("page_size", "page_token")
    PAGE_SIZE_FIELD_NUMBER: _ClassVar[int]
    PAGE_TOKEN_FIELD_NUMBER: _ClassVar[int]
    page_size: int
    page_token: str
    def __init__(self, page_size: _Optional[int] = ..., page_token: _Optional[str] = ...) -> None: ...

class ListLoadedRewardModelsResponse(_message.Message):
    __slots__ = ("models", "next_page_token", "cache", "shadow")
    MODELS_FIELD_NUMBER: _ClassVar[int]
    NEXT_PAGE_TOKEN_FIELD_NUMBER: _ClassVar[int]
    CACHE_FIELD_NUMBER: _ClassVar[int]
    SHADOW_FIELD_NUMBER: _ClassVar[int]
    models: _containers.RepeatedCompositeFieldContainer[LoadedRewardModel]
    next_page_token: str
    cache: ScoreCacheState
    shadow: RewardModelShadow
    def __init__(self, models: _Optional[_Iterable[_Union[LoadedRewardModel, _Mapping]]] = ..., next_page_token: _Optional[str] = ..., cache: _Optional[_Union[ScoreCacheState, _Mapping]] = ..., shadow: _Optional[_Union[RewardModelShadow, _Mapping]] = ...) -> None: ...
