"""Reasons of AdapterService: who may change what a generator serves, and what makes it refuse an adapter."""

from __future__ import annotations

from typing import Final

from grpc import StatusCode

from tether.reasons.entry import Group, Reason

BEGIN: Final = ("AdapterService.BeginPush",)
CHUNKS: Final = ("AdapterService.PushChunks",)
COMMIT: Final = ("AdapterService.CommitPush",)
PUSH: Final = (*BEGIN, *CHUNKS, *COMMIT)
POINTER: Final = ("AdapterService.ActivateAdapter", "AdapterService.RollbackAdapter")
DELETE: Final = ("AdapterService.DeleteAdapter",)
RUN_TOO: Final = "run"
"""A push that fails for good ends the training run that makes it."""

ACTIVATION: Final = Group(
    "Adapters: who, when and where",
    "Reasons of the calls that change what a generator serves. Answers are kept by `request_id`: a repeat with the same"
    " one gets the first answer.",
    (
        Reason(
            name="CONFLICT",
            code=StatusCode.ABORTED,
            meaning="Another call was first: another version is active than expected, or this one is being committed.",
            remedy="Read the active adapter again and decide with what it says.",
            repeat="reread",
            places=(*POINTER, *BEGIN, RUN_TOO, "command"),
        ),
        Reason(
            name="STALE_EPOCH",
            code=StatusCode.ABORTED,
            meaning="A newer writer of this run was here; this one is fenced off and changes nothing any more.",
            remedy="Stop this writer. Take an epoch above the newest one only if no other writer of the run is left.",
            repeat="reread",
            places=(*BEGIN, *COMMIT, *POINTER, *DELETE, RUN_TOO),
        ),
        Reason(
            name="NOT_FOUND",
            code=StatusCode.NOT_FOUND,
            meaning="What is named does not exist here: a loaded version, an open upload, a model folder, a file.",
            remedy="Look at ListAdapters; begin an expired upload again; of a file or folder, correct the path.",
            repeat="reread",
            places=(*PUSH, "AdapterService.ActivateAdapter", *DELETE, "start", "run", "command"),
        ),
        Reason(
            name="VERSION_EXISTS",
            code=StatusCode.FAILED_PRECONDITION,
            meaning="The run has another adapter of this version already; versions are written once.",
            remedy="Push under the next number, or delete that version first.",
            repeat="repaired",
            places=(*BEGIN, *COMMIT, RUN_TOO),
        ),
        Reason(
            name="VERSION_ACTIVE",
            code=StatusCode.FAILED_PRECONDITION,
            meaning="The version that was to be deleted is the active one.",
            remedy="Activate another version first.",
            repeat="repaired",
            places=DELETE,
        ),
        Reason(
            name="NOTHING_BELOW",
            code=StatusCode.FAILED_PRECONDITION,
            meaning="The base model is active, so that there is no version to roll back to.",
            remedy="Activate the version that you want.",
            repeat="repaired",
            places=("AdapterService.RollbackAdapter",),
        ),
        Reason(
            name="STORAGE_FULL",
            code=StatusCode.RESOURCE_EXHAUSTED,
            meaning="A disk has no room, or the quota of adapters is used up; what was there before is kept.",
            remedy="Free space on the disk that the message names, or raise `adapters.quota_bytes`.",
            repeat="told",
            places=(*PUSH, *POINTER, *DELETE, "RewardModelService", "OrchestratorService", RUN_TOO, "command"),
        ),
        Reason(
            name="TOO_MANY_UPLOADS",
            code=StatusCode.RESOURCE_EXHAUSTED,
            meaning="As many uploads are open as a generator allows at once.",
            remedy="Wait as long as told: uploads that nobody sends any more are dropped.",
            repeat="told",
            places=(*BEGIN, RUN_TOO),
        ),
        Reason(
            name="WRONG_OFFSET",
            code=StatusCode.FAILED_PRECONDITION,
            meaning="A chunk does not follow the bytes that the server has.",
            remedy="Call BeginPush again and send from its committed_offset; the Python client does.",
            repeat="repaired",
            places=CHUNKS,
        ),
        Reason(
            name="CHUNK_DAMAGED",
            code=StatusCode.FAILED_PRECONDITION,
            meaning="The bytes of a chunk do not have the CRC-32 that came with them; nothing of it was kept.",
            remedy="Call BeginPush again and send from its committed_offset; the Python client does.",
            repeat="repaired",
            places=CHUNKS,
        ),
        Reason(
            name="STREAM_REPLACED",
            code=StatusCode.ABORTED,
            meaning="A later BeginPush has opened another stream for this upload.",
            remedy="Let that one go on, or call BeginPush again to take over.",
            repeat="reread",
            places=CHUNKS,
        ),
        Reason(
            name="COMMITTING",
            code=StatusCode.FAILED_PRECONDITION,
            meaning="The upload is being committed and takes no more bytes.",
            remedy="Call CommitPush for its result.",
            repeat="no",
            places=CHUNKS,
        ),
        Reason(
            name="UPLOAD_INCOMPLETE",
            code=StatusCode.FAILED_PRECONDITION,
            meaning="Not all declared bytes have arrived.",
            remedy="Send the rest, then commit.",
            repeat="repaired",
            places=COMMIT,
        ),
        Reason(
            name="OWNER_UNKNOWN",
            code=StatusCode.FAILED_PRECONDITION,
            meaning="Another run owns the generator, and no orchestrator says whether it is being trained.",
            remedy="Name the orchestrator with `--orchestrator`, or give `--take` if the run is not being trained.",
            repeat="repaired",
            places=("command",),
        ),
        Reason(
            name="IN_TRAINING",
            code=StatusCode.FAILED_PRECONDITION,
            meaning="The run that this would interfere with is being trained.",
            remedy="Wait for its end, use another run id, or give `--take` to do it all the same.",
            repeat="repaired",
            places=("command",),
        ),
    ),
)

VERIFICATION: Final = Group(
    "Adapters: what is refused",
    "Checks of an adapter before it can serve. What was active goes on serving. A refusal ends the training run"
    " that made the adapter.",
    (
        Reason(
            name="WRONG_BASE_MODEL",
            code=StatusCode.FAILED_PRECONDITION,
            meaning="The adapter was made for another base model than the one that is served.",
            remedy="Serve the base that it was trained on; GetGenerator gives its hash.",
            repeat="repaired",
            places=(*BEGIN, RUN_TOO, "start", "command"),
        ),
        Reason(
            name="RANK_TOO_LARGE",
            code=StatusCode.FAILED_PRECONDITION,
            meaning="The rank of the adapter is above `adapters.max_rank` of the generator.",
            remedy="Raise that setting, or train with a smaller rank.",
            repeat="repaired",
            places=(*BEGIN, RUN_TOO, "start"),
        ),
        Reason(
            name="UNKNOWN_TARGET_MODULE",
            code=StatusCode.FAILED_PRECONDITION,
            meaning="The adapter changes a layer that the base model does not have.",
            remedy="Name linear layers of this base model.",
            repeat="repaired",
            places=(*BEGIN, RUN_TOO),
        ),
        Reason(
            name="HASH_MISMATCH",
            code=StatusCode.FAILED_PRECONDITION,
            meaning="The bytes of a file are not those whose SHA-256 was declared.",
            remedy="Push again. If it comes back, memory or disk of one side damages data.",
            repeat="repaired",
            places=(*COMMIT, RUN_TOO),
        ),
        Reason(
            name="BAD_ADAPTER_CONFIG",
            code=StatusCode.FAILED_PRECONDITION,
            meaning="The adapter_config.json is no plain LoRA configuration, or differs from what was declared.",
            remedy="Correct what the message names; only what the engines compute is accepted.",
            repeat="repaired",
            places=(*COMMIT, RUN_TOO),
        ),
        Reason(
            name="NOT_SAFETENSORS",
            code=StatusCode.FAILED_PRECONDITION,
            meaning="The adapter_model.safetensors is not a valid file of that format.",
            remedy="Save the adapter again.",
            repeat="repaired",
            places=(*COMMIT, RUN_TOO),
        ),
        Reason(
            name="BAD_DTYPE",
            code=StatusCode.FAILED_PRECONDITION,
            meaning="A tensor has a numeric type that is not accepted.",
            remedy="Save the adapter in float32, bfloat16 or float16.",
            repeat="repaired",
            places=(*COMMIT, RUN_TOO),
        ),
        Reason(
            name="UNKNOWN_TENSOR",
            code=StatusCode.FAILED_PRECONDITION,
            meaning="A tensor belongs to no layer of this base and these targets; it would change nothing.",
            remedy="Save the adapter with the names that PEFT gives on this base.",
            repeat="repaired",
            places=(*COMMIT, RUN_TOO),
        ),
        Reason(
            name="MISSING_TENSOR",
            code=StatusCode.FAILED_PRECONDITION,
            meaning="A tensor of a declared layer is not in the file.",
            remedy="Save all of the adapter, or declare the layers that it has.",
            repeat="repaired",
            places=(*COMMIT, RUN_TOO),
        ),
        Reason(
            name="WRONG_SHAPE",
            code=StatusCode.FAILED_PRECONDITION,
            meaning="A tensor does not have the shape that the base and the declared rank give it.",
            remedy="Declare the rank that the adapter has; compare the base.",
            repeat="repaired",
            places=(*COMMIT, RUN_TOO),
        ),
        Reason(
            name="NOT_FINITE",
            code=StatusCode.FAILED_PRECONDITION,
            meaning="A tensor holds infinities or values that are no numbers.",
            remedy="Go back to an earlier step of the training.",
            repeat="repaired",
            places=(*COMMIT, RUN_TOO),
        ),
        Reason(
            name="LOAD_FAILED",
            code=StatusCode.FAILED_PRECONDITION,
            meaning="The engine could not load the adapter, although every check of its files passed.",
            remedy="Read the generator's log, which holds the engine's own error.",
            repeat="repaired",
            places=(*COMMIT, RUN_TOO, "start"),
        ),
        Reason(
            name="PROOF_FAILED",
            code=StatusCode.FAILED_PRECONDITION,
            meaning="With the loaded adapter the probes have other log-probabilities than the trainer has computed.",
            remedy="Compare dtype, quantization and library versions of trainer and generator.",
            repeat="repaired",
            places=(*COMMIT, RUN_TOO, "start"),
        ),
        Reason(
            name="DIFFERS_FROM_BASE",
            code=StatusCode.FAILED_PRECONDITION,
            meaning="The adapter was declared to change nothing, and does.",
            remedy="Declare differs_from_base as it is.",
            repeat="repaired",
            places=(*COMMIT, RUN_TOO, "start"),
        ),
        Reason(
            name="SAME_AS_BASE",
            code=StatusCode.FAILED_PRECONDITION,
            meaning="The adapter was declared to change something, and loaded it does not: the engine ignores it.",
            remedy="Compare the names of its tensors with the base; take probes that show the change.",
            repeat="repaired",
            places=(*COMMIT, RUN_TOO, "start"),
        ),
        Reason(
            name="EFFECT_TOO_SMALL",
            code=StatusCode.FAILED_PRECONDITION,
            meaning="The loaded adapter changes the probes much less than where it was trained: a part is ignored.",
            remedy="Compare rank, alpha and layers with what the engine supports.",
            repeat="repaired",
            places=(*COMMIT, RUN_TOO, "start"),
        ),
        Reason(
            name="SAME_AS_BEFORE",
            code=StatusCode.FAILED_PRECONDITION,
            meaning="The loaded adapter computes what the version before it does: the engine took it for that one.",
            remedy="Restart the generator, then push again.",
            repeat="repaired",
            places=(*COMMIT, RUN_TOO, "start"),
        ),
        Reason(
            name="BASE_CHANGED",
            code=StatusCode.FAILED_PRECONDITION,
            meaning="The base model has changed: in the generator since its start, or on disk since a run began.",
            remedy="Restart the generator; for a run, put the old files back or start a new run.",
            repeat="repaired",
            places=(*COMMIT, RUN_TOO, "start"),
        ),
        Reason(
            name="MANIFEST_DAMAGED",
            code=StatusCode.FAILED_PRECONDITION,
            meaning="A stored version is not what was stored; it was set aside and is not served.",
            remedy="Push it again.",
            repeat="repaired",
            places=("start",),
        ),
    ),
)
