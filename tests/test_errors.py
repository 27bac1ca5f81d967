"""Errors that a user can cause: three parts, and an exit code."""

import copy

import pytest

from dpctl.errors import DpctlError, GateError


def test_the_text_has_three_parts() -> None:
    problem = DpctlError("the output exists", "demo", "choose another --out")
    assert str(problem) == "the output exists\n  got: demo\n  do:  choose another --out"
    assert (problem.failed, problem.got, problem.todo) == ("the output exists", "demo", "choose another --out")


def test_a_gate_is_a_user_error_with_a_code_of_its_own() -> None:
    assert issubclass(GateError, DpctlError)
    assert (DpctlError.exit_code, GateError.exit_code) == (1, 3)


def test_every_part_is_required() -> None:
    with pytest.raises(TypeError):
        DpctlError("failed", "got")  # type: ignore[call-arg]


@pytest.mark.parametrize("kind", [DpctlError, GateError])
def test_an_error_can_be_rebuilt_from_its_arguments(kind: type[DpctlError]) -> None:
    again = copy.copy(kind("a", "b", "c"))
    assert type(again) is kind
    assert str(again) == str(kind("a", "b", "c"))
