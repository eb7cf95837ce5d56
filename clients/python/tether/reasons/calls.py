"""Reasons of calls that serve: those of every service, of sampling and scoring, and of gRPC itself."""

from __future__ import annotations

from typing import Final

from grpc import StatusCode

from tether.reasons.entry import Group, Reason

EVERY: Final = ("every service",)
BATCHED: Final = (
    "GeneratorService.Generate",
    "RewardService.Score",
    "RewardService.Compare",
    "ReferenceService.ComputeLogprobs",
)
"""Methods whose items wait in a queue."""
SCORING: Final = ("RewardService.Score", "RewardService.Compare")
ITEMS: Final = ("RewardService.Score.items", "RewardService.Compare")
CHAT: Final = ("GeneratorService.Generate", "RewardService.Score.items")
ANYWHERE: Final = (*EVERY, "client")

ANY_CALL: Final = Group(
    "Any call",
    "Reasons of every service. An item of `Score` can have `INVALID_FIELD` and `INTERNAL` as its own error.",
    (
        Reason(
            name="INVALID_FIELD",
            code=StatusCode.INVALID_ARGUMENT,
            meaning="A field of the request, a setting or an argument is missing, of the wrong form or out of range.",
            remedy="Change what the violations name; each says what would be accepted.",
            repeat="no",
            places=("every service", "client", "start", "run", "command"),
        ),
        Reason(
            name="DEADLINE_MISSING",
            code=StatusCode.INVALID_ARGUMENT,
            meaning="The call has no deadline.",
            remedy="Set one (`timeout=` in gRPC). The Python client always does.",
            repeat="no",
            places=EVERY,
        ),
        Reason(
            name="DEADLINE_TOO_LONG",
            code=StatusCode.INVALID_ARGUMENT,
            meaning="The deadline is further away than `max_deadline_seconds` of the service.",
            remedy="Set a shorter one, or raise that setting.",
            repeat="no",
            places=EVERY,
        ),
        Reason(
            name="UNAUTHENTICATED",
            code=StatusCode.UNAUTHENTICATED,
            meaning="The call has no credentials, or none that the service knows.",
            remedy="Send a valid token or certificate.",
            repeat="no",
            places=EVERY,
        ),
        Reason(
            name="PERMISSION_DENIED",
            code=StatusCode.PERMISSION_DENIED,
            meaning="The credentials are good and lack the scope of this method.",
            remedy="Use credentials that hold the scope.",
            repeat="no",
            places=EVERY,
        ),
        Reason(
            name="QUEUE_FULL",
            code=StatusCode.RESOURCE_EXHAUSTED,
            meaning="So many items are waiting that those of this call do not fit; none was taken.",
            remedy="Wait as long as told, then send the same; if it stays so, send less or add replicas.",
            repeat="told",
            places=BATCHED,
        ),
        Reason(
            name="STARTING",
            code=StatusCode.UNAVAILABLE,
            meaning="The service has not loaded its model yet.",
            remedy="Wait until its health is SERVING.",
            repeat="later",
            places=EVERY,
        ),
        Reason(
            name="DRAINING",
            code=StatusCode.UNAVAILABLE,
            meaning="The service is stopping and takes no new calls.",
            remedy="Call again: another replica, or the one that comes in its place, answers.",
            repeat="later",
            places=EVERY,
        ),
        Reason(
            name="ENGINE_FAILED",
            code=StatusCode.UNAVAILABLE,
            meaning="The engine of the service does not answer any more; its liveness fails.",
            remedy="Have the process replaced; its log says why. Calls to other replicas go on.",
            repeat="later",
            places=EVERY,
        ),
        Reason(
            name="DEADLINE_EXCEEDED",
            code=StatusCode.DEADLINE_EXCEEDED,
            meaning="The deadline passed before there was an answer.",
            remedy="Give the call more time or less work.",
            repeat="later",
            places=ANYWHERE,
        ),
        Reason(
            name="CANCELLED",
            code=StatusCode.CANCELLED,
            meaning="The caller cancelled the call, or closed the connection; a run ends so after CancelRun.",
            remedy="Nothing is wrong.",
            repeat="later",
            places=(*ANYWHERE, "run"),
        ),
        Reason(
            name="INTERNAL",
            code=StatusCode.INTERNAL,
            meaning="A defect of the service; its log has the details.",
            remedy="Report it with the time of the call.",
            repeat="no",
            places=(*ANYWHERE, "run"),
        ),
        Reason(
            name="UNIMPLEMENTED",
            code=StatusCode.UNIMPLEMENTED,
            meaning="There is no such method at this address.",
            remedy="Compare the address and the versions of both sides; AdapterService has a port of its own.",
            repeat="no",
            places=ANYWHERE,
        ),
    ),
)

SERVING: Final = Group(
    "Sampling and scoring",
    "Reasons of the three services that run models.",
    (
        Reason(
            name="MODEL_NOT_FOUND",
            code=StatusCode.NOT_FOUND,
            meaning="The reward service has no model of this name.",
            remedy="Take a name that ListRewardModels gives, or leave it empty for the default one.",
            repeat="no",
            places=SCORING,
        ),
        Reason(
            name="VERSION_NOT_FOUND",
            code=StatusCode.NOT_FOUND,
            meaning="The reward model is not loaded in this version.",
            remedy="Take a version that ListRewardModels gives, or leave it empty; those of the store can be loaded.",
            repeat="no",
            places=(*SCORING, "RewardModelService"),
        ),
        Reason(
            name="EMPTY",
            code=StatusCode.INVALID_ARGUMENT,
            meaning="An item has no response, so that there is nothing to judge.",
            remedy="Send a response, or leave the item out.",
            repeat="no",
            places=ITEMS,
        ),
        Reason(
            name="SEVERAL_FORMS",
            code=StatusCode.INVALID_ARGUMENT,
            meaning="An item holds more than one of text, messages and token ids.",
            remedy="Send it in one form.",
            repeat="no",
            places=("RewardService.Score.items",),
        ),
        Reason(
            name="TOO_LONG",
            code=StatusCode.INVALID_ARGUMENT,
            meaning="The response (of the reference: with its prompt) has more tokens than the model reads.",
            remedy="Shorten it to `max_model_len`; responses are never cut.",
            repeat="no",
            places=(*ITEMS, "ReferenceService.ComputeLogprobs"),
        ),
        Reason(
            name="NO_TOKENIZER",
            code=StatusCode.INVALID_ARGUMENT,
            meaning="Token ids were sent to a model of rules that has no tokenizer to read them with.",
            remedy="Send text, or give the model a `tokenizer`.",
            repeat="no",
            places=("RewardService.Score.items",),
        ),
        Reason(
            name="NO_CHAT_TEMPLATE",
            code=StatusCode.FAILED_PRECONDITION,
            meaning="Messages were sent to a model without a chat template.",
            remedy="Send text or token ids, or serve a model that has one.",
            repeat="repaired",
            places=CHAT,
        ),
        Reason(
            name="CHAT_TEMPLATE_REFUSED",
            code=StatusCode.INVALID_ARGUMENT,
            meaning="The model's chat template does not accept this conversation, for example the order of its roles.",
            remedy="Change the conversation as the message says.",
            repeat="no",
            places=(*CHAT, "command"),
        ),
        Reason(
            name="RULE_FAILED",
            code=StatusCode.INTERNAL,
            meaning="The rule of a reward model raised an exception for this item, or gave no number.",
            remedy="Correct the rule; the service's log names the exception.",
            repeat="repaired",
            places=ITEMS,
        ),
        Reason(
            name="NON_FINITE_SCORE",
            code=StatusCode.INTERNAL,
            meaning="A reward model gave infinity or no number for this item.",
            remedy="Look at the model and its dtype; the item has no score.",
            repeat="no",
            places=ITEMS,
        ),
        Reason(
            name="NON_FINITE_LOGPROB",
            code=StatusCode.INTERNAL,
            meaning="The reference model gave a log-probability or an entropy that is not finite.",
            remedy="Look at the model and its dtype.",
            repeat="no",
            places=("ReferenceService.ComputeLogprobs",),
        ),
        Reason(
            name="RUN_NOT_ACTIVE",
            code=StatusCode.FAILED_PRECONDITION,
            meaning="The run that was named does not own the generator.",
            remedy="Activate one of its versions, or leave `run_id` empty to take whatever is served.",
            repeat="repaired",
            places=("GeneratorService.Generate", "command"),
        ),
        Reason(
            name="VERSION_NOT_LOADED",
            code=StatusCode.FAILED_PRECONDITION,
            meaning="The policy version that was asked for is not loaded.",
            remedy="Push it, or ask for one that GetGenerator lists.",
            repeat="repaired",
            places=("GeneratorService.Generate",),
        ),
        Reason(
            name="ADAPTER_MISSING",
            code=StatusCode.UNAVAILABLE,
            meaning="The version that was active before a restart of the generator could not be loaded again.",
            remedy="Push it again or activate another one; until then ask for version 0 or another one that is loaded.",
            repeat="repaired",
            places=("GeneratorService.Generate",),
        ),
        Reason(
            name="ENGINE_DEAD",
            code=StatusCode.UNAVAILABLE,
            meaning="The engine of the generator has died; its liveness fails.",
            remedy="Have the process replaced; its log says why.",
            repeat="later",
            places=("GeneratorService.Generate", "AdapterService.CommitPush"),
        ),
    ),
)

TRANSPORT: Final = Group(
    "gRPC and proxies",
    "Where a failure does not come from a tether service but from gRPC, a proxy or the network, it has no reason of its"
    " own: the Python client takes the name of its status code. Most codes have an entry above; these are the others.",
    (
        Reason(
            name="UNAVAILABLE",
            code=StatusCode.UNAVAILABLE,
            meaning="The service cannot be reached, or the connection broke under the call.",
            remedy="Compare the address; look whether the service runs. The client repeats calls without effect.",
            repeat="later",
            places=("client", "run", "command"),
        ),
        Reason(
            name="RESOURCE_EXHAUSTED",
            code=StatusCode.RESOURCE_EXHAUSTED,
            meaning="A message is larger than one side accepts, or a proxy limits the rate.",
            remedy="Send smaller messages: fewer items, shorter texts.",
            repeat="no",
            places=("client",),
        ),
        Reason(
            name="INVALID_ARGUMENT",
            code=StatusCode.INVALID_ARGUMENT,
            meaning="Something between the two sides did not accept the request.",
            remedy="Read the message; compare the versions of both sides.",
            repeat="no",
            places=("client",),
        ),
        Reason(
            name="ABORTED",
            code=StatusCode.ABORTED,
            meaning="Something between the two sides gave the call up.",
            remedy="Read the message, then call again.",
            repeat="later",
            places=("client",),
        ),
        Reason(
            name="ALREADY_EXISTS",
            code=StatusCode.ALREADY_EXISTS,
            meaning="No tether service gives this code; what answered is something else.",
            remedy="Look at what listens at the address.",
            repeat="no",
            places=("client",),
        ),
        Reason(
            name="OUT_OF_RANGE",
            code=StatusCode.OUT_OF_RANGE,
            meaning="No tether service gives this code; what answered is something else.",
            remedy="Look at what listens at the address.",
            repeat="no",
            places=("client",),
        ),
        Reason(
            name="DATA_LOSS",
            code=StatusCode.DATA_LOSS,
            meaning="No tether service gives this code; what answered is something else.",
            remedy="Look at what listens at the address.",
            repeat="no",
            places=("client",),
        ),
        Reason(
            name="UNKNOWN",
            code=StatusCode.UNKNOWN,
            meaning="What answered gave no code, or one that does not exist.",
            remedy="Look at what listens at the address, and at its log.",
            repeat="no",
            places=("client",),
        ),
    ),
)
