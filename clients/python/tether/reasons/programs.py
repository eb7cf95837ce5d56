"""Reasons of what runs on the caller's side: settings, the client, the commands and the offline stages."""

from __future__ import annotations

from typing import Final

from grpc import StatusCode

from tether.reasons.entry import Group, Reason

PROGRAMS: Final = Group(
    "Settings, client and commands",
    "Reasons of one's own side. `INVALID_CONFIG` ends a process with status 42; `StartRun` sends it too.",
    (
        Reason(
            name="INVALID_CONFIG",
            code=StatusCode.INVALID_ARGUMENT,
            meaning="A key of the configuration is unknown, missing, out of range or without effect.",
            remedy="Change what the violations name by path; `--dry-run` prints what a configuration resolves to.",
            repeat="no",
            places=("OrchestratorService.StartRun", "OrchestratorService.ResumeRun", "start", "run", "command"),
        ),
        Reason(
            name="INSECURE_ADDRESS",
            code=StatusCode.INVALID_ARGUMENT,
            meaning="A service was to listen where other machines reach it, without security.",
            remedy="Bind to 127.0.0.1, secure it, or set `insecure = true` on a network that you trust.",
            repeat="no",
            places=("start",),
        ),
        Reason(
            name="CLIENT_CLOSED",
            code=StatusCode.FAILED_PRECONDITION,
            meaning="The client was closed before the call or during it.",
            remedy="Open a new one; close it after the last call.",
            repeat="no",
            places=("client",),
        ),
        Reason(
            name="BREAKER_OPEN",
            code=StatusCode.UNAVAILABLE,
            meaning="The call was not made: the last ones had no answer, and the service's health is probed.",
            remedy="Wait until the service serves; the client then calls it again by itself.",
            repeat="later",
            places=("client", "run"),
        ),
        Reason(
            name="NOT_JSON",
            code=StatusCode.INVALID_ARGUMENT,
            meaning="The body of a request of OpenRLHF is not JSON.",
            remedy="Look at what calls the endpoint.",
            repeat="no",
            places=("client",),
        ),
        Reason(
            name="PROMPT_MISMATCH",
            code=StatusCode.INVALID_ARGUMENT,
            meaning="A prompt or a query is not made as `prompt_template` or OpenRLHF would make it.",
            remedy="Give the template that was applied; raise the length limit that cuts prompts.",
            repeat="no",
            places=("client",),
        ),
        Reason(
            name="NO_PROMPT",
            code=StatusCode.INVALID_ARGUMENT,
            meaning="The data of verl hold no prompt under `prompt_key`.",
            remedy="Put it into extra_info when the data set is made.",
            repeat="no",
            places=("client",),
        ),
        Reason(
            name="NO_REWARD_MODEL",
            code=StatusCode.FAILED_PRECONDITION,
            meaning="The reward service offers no model.",
            remedy="Have it load one.",
            repeat="repaired",
            places=("client",),
        ),
        Reason(
            name="STORAGE_READ_ONLY",
            code=StatusCode.FAILED_PRECONDITION,
            meaning="A file system is read-only; what was there before is kept.",
            remedy="Make it writable.",
            repeat="repaired",
            places=("RewardModelService", "run", "command"),
        ),
        Reason(
            name="SERVICE_FAILED",
            code=StatusCode.FAILED_PRECONDITION,
            meaning="A service that `tether up` or `tether demo` runs ended, and starting it again did not help.",
            remedy="Read its last lines in the message.",
            repeat="repaired",
            places=("command",),
        ),
        Reason(
            name="SETTINGS_CHANGED",
            code=StatusCode.FAILED_PRECONDITION,
            meaning="The output folder of a stage was begun with other settings or data.",
            remedy="Name another folder, or take the old settings.",
            repeat="repaired",
            places=("command",),
        ),
        Reason(
            name="REFERENCE_DIFFERS",
            code=StatusCode.FAILED_PRECONDITION,
            meaning="The reference service computes other log-probabilities than the base that the stage has loaded.",
            remedy="Serve it with the same dtype and quantization, or leave `reference` empty.",
            repeat="repaired",
            places=("command",),
        ),
        Reason(
            name="ADAPTER_NOT_COMMITTED",
            code=StatusCode.FAILED_PRECONDITION,
            meaning="The adapter to export is not one that a committed step has made.",
            remedy="Export another version; the message names the folder that has them.",
            repeat="repaired",
            places=("command",),
        ),
        Reason(
            name="LEDGER_UNREADABLE",
            code=StatusCode.FAILED_PRECONDITION,
            meaning="A command cannot read the ledger's file.",
            remedy="Start the orchestrator on it once.",
            repeat="repaired",
            places=("command",),
        ),
    ),
)
