"""Reasons of loading, switching and comparing reward models."""

from __future__ import annotations

from typing import Final

from grpc import StatusCode

from tether.reasons.entry import Group, Reason

LOAD: Final = ("RewardModelService.LoadRewardModel",)
UNLOAD: Final = ("RewardModelService.UnloadRewardModel",)
SELECT: Final = ("RewardService.Score", "RewardService.Compare")

REWARD_MODELS: Final = Group(
    "Reward models",
    "Reasons of selecting a version of a reward model, and of the control port that loads and switches them.",
    (
        Reason(
            name="VERSION_CONTRADICTS",
            code=StatusCode.INVALID_ARGUMENT,
            meaning="The model is given as `name@version` and the version as another one.",
            remedy="Give the version once.",
            repeat="no",
            places=SELECT,
        ),
        Reason(
            name="NO_MODEL_STORE",
            code=StatusCode.FAILED_PRECONDITION,
            meaning="The service has no folder to load versions from.",
            remedy="Set `model_store` and start it again.",
            repeat="repaired",
            places=LOAD,
        ),
        Reason(
            name="MODEL_LOAD_FAILED",
            code=StatusCode.FAILED_PRECONDITION,
            meaning="The version is no reward model, lacks something, or gives values that are not finite numbers.",
            remedy="Put right what the message names; nothing has changed, and the others are served.",
            repeat="repaired",
            places=LOAD,
        ),
        Reason(
            name="OUTSIDE_STORE",
            code=StatusCode.FAILED_PRECONDITION,
            meaning="The version has a link in it, or a path, base or tokenizer that is not a folder of the store.",
            remedy="Copy what it needs into the store.",
            repeat="repaired",
            places=LOAD,
        ),
        Reason(
            name="RULE_NOT_ALLOWED",
            code=StatusCode.FAILED_PRECONDITION,
            meaning="A `model.toml` names a function of a module that the configuration does not allow.",
            remedy="Add the module to `rule_modules` if you trust it, and start the service again.",
            repeat="repaired",
            places=LOAD,
        ),
        Reason(
            name="WRONG_SHA256",
            code=StatusCode.FAILED_PRECONDITION,
            meaning="The version has another content hash than the one that was expected.",
            remedy="Find out which of the two is right; no call can select the version.",
            repeat="repaired",
            places=LOAD,
        ),
        Reason(
            name="UNLOADING",
            code=StatusCode.FAILED_PRECONDITION,
            meaning="The same version is still being unloaded: calls in flight use it.",
            remedy="Load it again when ListLoadedRewardModels no longer shows it.",
            repeat="repaired",
            places=LOAD,
        ),
        Reason(
            name="LOAD_IN_PROGRESS",
            code=StatusCode.RESOURCE_EXHAUSTED,
            meaning="Another version is being loaded; one is loaded at a time.",
            remedy="Call again when it is there.",
            repeat="told",
            places=LOAD,
        ),
        Reason(
            name="TOO_MANY_MODELS",
            code=StatusCode.RESOURCE_EXHAUSTED,
            meaning="As many versions are held as `max_models` allows, those that are being unloaded included.",
            remedy="Unload one, or raise `max_models` if the memory is there.",
            repeat="told",
            places=LOAD,
        ),
        Reason(
            name="DEFAULT_MODEL",
            code=StatusCode.FAILED_PRECONDITION,
            meaning="The version is what calls without a name use.",
            remedy="Make another one the default first.",
            repeat="repaired",
            places=UNLOAD,
        ),
        Reason(
            name="DEFAULT_VERSION",
            code=StatusCode.FAILED_PRECONDITION,
            meaning="The version is what calls with its name alone use, and the name has other versions.",
            remedy="Make another version the default of the name first.",
            repeat="repaired",
            places=UNLOAD,
        ),
        Reason(
            name="SHADOWED",
            code=StatusCode.FAILED_PRECONDITION,
            meaning="The version is base or candidate of the shadow.",
            remedy="Clear the shadow first.",
            repeat="repaired",
            places=UNLOAD,
        ),
        Reason(
            name="LAST_MODEL",
            code=StatusCode.FAILED_PRECONDITION,
            meaning="The version is the only one that is loaded.",
            remedy="Load another one and make it the default first.",
            repeat="repaired",
            places=UNLOAD,
        ),
        Reason(
            name="UNEXPECTED_DEFAULT",
            code=StatusCode.ABORTED,
            meaning="Another version is the default than the one that was expected: somebody has switched meanwhile.",
            remedy="Look at ListLoadedRewardModels and decide anew.",
            repeat="reread",
            places=("RewardModelService.SetDefaultRewardModel",),
        ),
    ),
)
