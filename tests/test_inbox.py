"""The bounded queue between the network thread and the owner of the state."""

from __future__ import annotations

import threading

from wire.inbox import Connected, Disconnected, Inbox, Received


def _tensor(number: int, size_bytes: int = 10, *, topic: str = "up/activations") -> Received:
    return Received(
        topic=f"{topic}/{number}",
        payload=bytes([number % 256]) * size_bytes,
        retained=False,
        schema=None,
        arrived_s=float(number),
        droppable=True,
    )


def _control(number: int, size_bytes: int = 10) -> Received:
    return Received(
        topic=f"up/birth/{number}",
        payload=bytes(size_bytes),
        retained=False,
        schema=None,
        arrived_s=float(number),
    )


def _weights(number: int, size_bytes: int = 10) -> Received:
    return Received(
        topic="fleet/weights",
        payload=bytes([number]) * size_bytes,
        retained=False,
        schema=None,
        arrived_s=float(number),
        droppable=True,
        replaces=True,
    )


def _take_all(inbox: Inbox) -> list[object]:
    return [inbox.get(0.0) for _ in range(len(inbox))]


def test_events_come_out_in_the_order_they_went_in() -> None:
    inbox = Inbox()
    events = [Connected(1, None), _control(1), _tensor(2), Disconnected("gone"), _control(3)]
    for event in events:
        inbox.put(event)
    assert _take_all(inbox) == events
    assert inbox.get(0.0) is None


def test_full_queue_drops_the_oldest_tensor_message_first() -> None:
    inbox = Inbox(max_messages=3)
    kept = [_control(0), _tensor(2), _tensor(3)]
    for event in (kept[0], _tensor(1), kept[1], kept[2]):
        inbox.put(event)
    assert _take_all(inbox) == kept
    assert inbox.take_dropped_topics() == ["up/activations/1"]
    assert inbox.take_dropped_topics() == []


def test_bytes_are_bounded_like_messages() -> None:
    inbox = Inbox(max_bytes=100)
    for number in range(5):
        inbox.put(_tensor(number, 40))
    assert [event.arrived_s for event in _take_all(inbox) if isinstance(event, Received)] == [3, 4]
    assert len(inbox.take_dropped_topics()) == 3


def test_room_comes_back_when_messages_are_taken() -> None:
    inbox = Inbox(max_bytes=100)
    for number in range(50):
        inbox.put(_tensor(number, 90))
        assert inbox.get(0.0) == _tensor(number, 90)
    assert inbox.take_dropped_topics() == []


def test_message_larger_than_the_bound_is_dropped_itself() -> None:
    inbox = Inbox(max_bytes=100)
    inbox.put(_tensor(1, 101))
    assert inbox.get(0.0) is None
    inbox.put(_tensor(2, 100))
    assert inbox.get(0.0) == _tensor(2, 100)


def test_control_messages_go_oldest_first_when_nothing_else_is_left() -> None:
    inbox = Inbox(max_messages=2)
    for number in range(4):
        inbox.put(_control(number))
    assert _take_all(inbox) == [_control(2), _control(3)]


def test_connection_events_are_never_dropped() -> None:
    inbox = Inbox(max_messages=2)
    events = [Connected(boot, None) for boot in range(5)]
    for event in events:
        inbox.put(event)
    inbox.put(_tensor(1))
    assert _take_all(inbox) == events
    assert inbox.take_dropped_topics() == ["up/activations/1"]


def test_newer_weights_take_the_place_of_older_ones() -> None:
    inbox = Inbox()
    for event in (_weights(1), _control(1), _weights(2), _control(2), _weights(3)):
        inbox.put(event)
    assert _take_all(inbox) == [_control(1), _control(2), _weights(3)]
    assert inbox.take_dropped_topics() == []  # replaced, not lost


def test_replaced_weights_give_their_bytes_back() -> None:
    inbox = Inbox(max_bytes=100)
    inbox.put(_tensor(0, 30))
    for number in range(20):
        inbox.put(_weights(number, 60))
    assert _take_all(inbox) == [_tensor(0, 30), _weights(19, 60)]
    assert inbox.take_dropped_topics() == []


def test_list_of_dropped_topics_is_bounded() -> None:
    inbox = Inbox(max_messages=1)
    for number in range(3000):
        inbox.put(_tensor(number))
    topics = inbox.take_dropped_topics()
    assert len(topics) == 1000
    assert topics[-1] == "up/activations/2998"


def test_wake_ends_a_wait_without_an_event() -> None:
    inbox = Inbox()
    taken: list[object] = []
    thread = threading.Thread(target=lambda: taken.append(inbox.get(None)), daemon=True)
    thread.start()
    inbox.wake()
    thread.join(30.0)
    assert not thread.is_alive()
    assert taken == [None]


def test_wake_before_the_wait_is_not_forgotten_and_counts_once() -> None:
    inbox = Inbox()
    inbox.wake()
    assert inbox.get(None) is None
    inbox.put(_control(1))
    assert inbox.get(None) == _control(1)


def test_waiting_owner_gets_an_event_from_another_thread() -> None:
    inbox = Inbox()
    taken: list[object] = []
    thread = threading.Thread(target=lambda: taken.append(inbox.get(None)), daemon=True)
    thread.start()
    inbox.put(_control(7))
    thread.join(30.0)
    assert taken == [_control(7)]


def test_no_event_is_lost_or_doubled_between_threads() -> None:
    inbox = Inbox()
    producers, each = 4, 500

    def produce(lane: int) -> None:
        for number in range(each):
            inbox.put(_tensor(number, topic=f"lane-{lane}"))

    threads = [threading.Thread(target=produce, args=(lane,)) for lane in range(producers)]
    for thread in threads:
        thread.start()
    taken: list[Received] = []
    while len(taken) < producers * each:
        event = inbox.get(10.0)
        assert isinstance(event, Received), "a message was lost"
        taken.append(event)
    for thread in threads:
        thread.join()
    assert inbox.get(0.0) is None
    for lane in range(producers):
        numbers = [e.arrived_s for e in taken if e.topic.startswith(f"lane-{lane}/")]
        assert numbers == list(range(each))
    assert inbox.take_dropped_topics() == []
