"""What the supervisor holds for the helper, and hands to the next one."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator

import pytest

from capture.helper.handover import DESCRIPTORS_A_MESSAGE_MAX, Hold, Keeper


@pytest.fixture
def keeper() -> Iterator[Keeper]:
    made = Keeper()
    yield made
    made.close_channel()
    made.let_go()


@pytest.fixture
def descriptors() -> Iterator[list[int]]:
    """What is put here is closed at the test's end."""
    made: list[int] = []
    yield made
    for fd in made:
        os.close(fd)


def pipes(count: int, descriptors: list[int]) -> list[int]:
    found: list[int] = []
    while len(found) < count:
        found += os.pipe()
    descriptors += found
    return found[:count]


def hold_of(keeper: Keeper) -> Hold:
    return Hold(keeper.open_channel())


def attend(keeper: Keeper, times: int) -> None:
    for _ in range(times):
        assert keeper.attend()


def test_the_next_helper_gets_what_the_last_one_had(keeper: Keeper, descriptors: list[int]) -> None:
    hold = hold_of(keeper)
    read_fd, write_fd = os.pipe()
    hold.keep("map:ring", {"size": 4}, [write_fd])
    hold.keep("gone", True)
    hold.drop("gone")
    attend(keeper, 3)
    os.close(write_fd)
    assert keeper.holds_probes
    following = hold_of(keeper)
    keeper.hand_over({"hosts": []})
    assert following.receive_all() == {"hosts": []}
    held = following.take("map:ring")
    assert held is not None
    assert held.about == {"size": 4}
    os.write(held.fds[0], b"x")
    assert os.read(read_fd, 1) == b"x"
    descriptors += [read_fd, *held.fds]
    assert following.take("gone") is None


def test_more_descriptors_than_a_message_takes(keeper: Keeper, descriptors: list[int]) -> None:
    hold = hold_of(keeper)
    count = 2 * DESCRIPTORS_A_MESSAGE_MAX + 10
    hold.keep("file:1:2:3", {"path": "/x"}, pipes(count, descriptors))
    attend(keeper, 3)
    following = hold_of(keeper)
    keeper.hand_over({})
    following.receive_all()
    ((name, held),) = following.take_all("file:")
    assert (name, len(held.fds), held.about) == ("file:1:2:3", count, {"path": "/x"})
    descriptors += held.fds


def test_what_is_held_anew_takes_the_place_of_the_old(
    keeper: Keeper, descriptors: list[int]
) -> None:
    hold = hold_of(keeper)
    (old_read, old_write), (new_read, new_write) = os.pipe(), os.pipe()
    hold.keep("x", 1, [old_write])
    hold.keep("x", 2, [new_write])
    os.close(old_write)
    descriptors += [old_read, new_read, new_write]
    attend(keeper, 2)
    assert os.read(old_read, 1) == b""  # the last descriptor of its other end is closed


def test_the_end_of_either_is_told(keeper: Keeper) -> None:
    hold = hold_of(keeper)
    keeper.close_channel()
    assert hold.receive_order() is None
    hold.keep("x", 1)  # nobody hears it
    far = keeper.open_channel()
    far.close()
    assert not keeper.attend()


def test_a_helper_that_begins_anew_leaves_nothing_held(
    keeper: Keeper, descriptors: list[int]
) -> None:
    hold = hold_of(keeper)
    hold.keep("map:x", True, pipes(1, descriptors))
    attend(keeper, 1)
    following = hold_of(keeper)
    keeper.hand_over({})
    following.receive_all()
    following.begin_anew()
    attend(keeper, 1)
    assert not keeper.holds_probes
    assert following.take_all("map:") == []


def test_a_reader_is_handed_on(keeper: Keeper) -> None:
    hold = hold_of(keeper)
    ours, theirs = socket.socketpair()
    keeper.connect(theirs)
    theirs.close()
    link = hold.receive_order()
    assert isinstance(link, socket.socket)
    ours.send(b"x")
    assert link.recv(9) == b"x"
    link.close()
    ours.close()


def test_hosts_are_handed_on(keeper: Keeper) -> None:
    hold = hold_of(keeper)
    keeper.set_hosts(["api.example.com", "*.example.org"])
    assert hold.receive_order() == ["api.example.com", "*.example.org"]


def test_without_a_supervisor_nothing_is_held_and_nothing_given() -> None:
    hold = Hold()
    hold.keep("x", 1)
    hold.drop("x")
    assert (hold.take("x"), hold.take_all(""), hold.fileno()) == (None, [], -1)
