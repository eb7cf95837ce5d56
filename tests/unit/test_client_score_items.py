"""Items on their way into messages."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from tether.errors import InvalidArgumentError
from tether.generator import Message
from tether.reward import ScoreItem
from tether.scores import item_message

TURNS = [Message("user", "Once"), Message("assistant", "upon a time")]


@pytest.mark.parametrize("messages", [TURNS, tuple(TURNS), np.array(TURNS, dtype=object)])
def test_a_conversation_may_be_any_sequence_of_messages(messages: Any) -> None:
    sent = item_message(ScoreItem(messages=messages), 0).messages
    assert [(message.role, message.content) for message in sent] == [(turn.role, turn.content) for turn in TURNS]


@pytest.mark.parametrize("messages", [None, 0, False])
def test_what_is_no_conversation_is_refused_with_its_field(messages: Any) -> None:
    with pytest.raises(InvalidArgumentError) as caught:
        item_message(ScoreItem("p", "r", messages=messages), 3)
    assert [violation.field for violation in caught.value.violations] == ["items[3].messages"]
