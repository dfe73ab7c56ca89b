"""A device written from docs/protocol.md alone: nothing of this project is imported here.

Standard library, paho, numpy, and ONNX Runtime for the forward pass. The backward pass is written
by hand for a client segment of one Linear layer and a ReLU. It orders its samples in its own way.

    python foreign_device.py --port 1883 --fleet lab --device other-01 --data own.npz --boot FILE
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import math
import queue
import signal
import socket
import struct
import sys
import zipfile
from pathlib import Path

import numpy as np
import onnxruntime
import paho.mqtt.client as mqtt
from paho.mqtt.enums import CallbackAPIVersion
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.properties import Properties

JSON_TYPE = "application/json"
TENSOR_TYPE = "application/vnd.safetensors"
TYPES = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "I64": "<i8", "I32": "<i4", "I16": "<i2"}
TYPES |= {"I8": "i1", "U8": "u1", "U16": "<u2", "U32": "<u4", "U64": "<u8"}
CHUNK_TIMEOUT_S = 10.0


class DroppedError(Exception):
    """A message that is of no use."""


class UnusableError(Exception):
    """A bundle that this device cannot run."""


# --- Tensor payloads ---------------------------------------------------------------------------


def write_tensors(tensors: dict[str, np.ndarray], metadata: dict[str, object]) -> bytes:
    """A safetensors file; metadata values become texts."""
    header: dict[str, object] = {"__metadata__": {k: str(v) for k, v in metadata.items()}}
    chunks, position = [], 0
    for name, array in tensors.items():
        data = np.ascontiguousarray(array).tobytes()
        kind = next(k for k, code in TYPES.items() if np.dtype(code) == array.dtype)
        header[name] = {
            "dtype": kind,
            "shape": list(array.shape),
            "data_offsets": [position, position + len(data)],
        }
        chunks.append(data)
        position += len(data)
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + b"".join(chunks)


def read_tensors(payload: bytes) -> tuple[dict[str, str], dict[str, np.ndarray]]:
    """Metadata and tensors of a safetensors file, F16 brought to float32 with its exponent."""
    (size,) = struct.unpack_from("<Q", payload)
    header = json.loads(payload[8 : 8 + size])
    metadata = header.pop("__metadata__", {})
    exponents = json.loads(metadata.get("scale_exponents", "{}"))
    tensors = {}
    for name, entry in header.items():
        begin, end = entry["data_offsets"]
        data = payload[8 + size + begin : 8 + size + end]
        array = np.frombuffer(data, TYPES[entry["dtype"]]).reshape(entry["shape"])
        if entry["dtype"] == "F16":
            array = array.astype(np.float32) * np.float32(2.0 ** -exponents.get(name, 0))
        tensors[name] = array
    return metadata, tensors


def in_fp16(
    tensors: dict[str, np.ndarray], largest_exponent: int
) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """Tensors as F16 with their exponents; activations are only scaled down (exponent <= 0)."""
    exponents = {}
    for name, array in tensors.items():
        largest = float(np.abs(array).max())
        exponent = math.floor(math.log2(2.0**14 / largest)) + 1 if largest else 0
        exponents[name] = max(-120, min(120, largest_exponent, exponent))
    scaled = {n: (a * np.float32(2.0 ** exponents[n])).astype("<f2") for n, a in tensors.items()}
    return scaled, {"scale_exponents": json.dumps(exponents)}


# --- The client segment ------------------------------------------------------------------------


class Segment:
    """One Linear layer and a ReLU: ONNX Runtime forward, backward by hand."""

    def __init__(self, data: bytes, digest: str) -> None:
        files = self._read_files(data)
        manifest = json.loads(files["manifest.json"])
        if manifest["schema"] != 1 or len(manifest["parameters"]) != 2 or manifest["buffers"]:
            raise UnusableError("expected one Linear layer with a bias, and a ReLU")
        self.digest = digest
        self.input_shape = tuple(manifest["input"]["shape"])
        self.activation_shape = tuple(manifest["activation"]["shape"])
        shapes = {p["name"]: tuple(p["shape"]) for p in manifest["parameters"]}
        self.weight_name = next(name for name, shape in shapes.items() if len(shape) == 2)
        self.bias_name = next(name for name, shape in shapes.items() if len(shape) == 1)
        _, self.weights = read_tensors(files["weights.safetensors"])
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        self._session = onnxruntime.InferenceSession(files["client_forward.onnx"], options)
        self._test_itself()

    @staticmethod
    def _read_files(data: bytes) -> dict[str, bytes]:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            if any(entry.compress_type != zipfile.ZIP_STORED for entry in archive.infolist()):
                raise UnusableError("expected stored files")
            files = {entry.filename: archive.read(entry) for entry in archive.infolist()}
        listed = json.loads(files["manifest.json"])["files"]
        for name, entry in listed.items():
            if hashlib.sha256(files[name]).hexdigest() != entry["sha256"]:
                raise UnusableError(f"{name} is damaged")
        return files

    def _test_itself(self) -> None:
        """The hand-written formula must be what the graph computes."""
        x = np.random.default_rng(0).standard_normal((3, *self.input_shape)).astype(np.float32)
        linear = x.reshape(3, -1) @ self.weights[self.weight_name].T + self.weights[self.bias_name]
        if np.abs(self.forward(x) - np.maximum(linear, 0)).max() > 1e-4:
            raise UnusableError("this device knows Linear and ReLU only")

    def forward(self, x: np.ndarray) -> np.ndarray:
        return self._session.run(["activations"], {**self.weights, "x": x})[0]

    def backward(self, x: np.ndarray, gradient: np.ndarray) -> dict[str, np.ndarray]:
        """Gradients of the parameters, summed over the rows."""
        through_relu = gradient * (self.forward(x) > 0)
        return {
            self.weight_name: through_relu.T @ x.reshape(len(x), -1),
            self.bias_name: through_relu.sum(axis=0),
        }


# --- The device --------------------------------------------------------------------------------


class Device:
    """One thread takes messages from a queue; paho's thread only fills it."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        with np.load(options.data) as archive:
            self.x = archive["x"].astype(np.float32)
            self.y = archive["y"].astype(np.uint8)
        self.events: queue.Queue[tuple[str, bytes] | None] = queue.Queue()
        self.root = f"splitfleet/v1/{options.fleet}"
        self.up = f"{self.root}/dev/{options.device}/up"
        self.segment: Segment | None = None
        self.download: tuple[dict, bytearray] | None = None
        self.allocation: dict | None = None
        self.go: dict[str, str] | None = None
        self.answered: dict[tuple[str, int, int, int], np.ndarray] = {}  # slot -> its samples
        self.dropped: list[str] = []
        self.boot = 0
        self.client = self._build_client()

    def _next_boot(self) -> int:
        path = Path(self.options.boot)
        boot = int(path.read_text()) + 1 if path.exists() else 1
        path.write_text(str(boot))
        return boot

    def _build_client(self) -> mqtt.Client:
        name = f"{self.options.fleet}-{self.options.device}"
        client = mqtt.Client(CallbackAPIVersion.VERSION2, name, protocol=mqtt.MQTTv5)
        client.on_socket_open = lambda _c, _u, sock: sock.setsockopt(
            socket.IPPROTO_TCP, socket.TCP_NODELAY, 1
        )
        client.on_pre_connect = self._set_will
        client.on_connect = self._on_connect
        client.on_message = lambda _c, _u, msg: self.events.put((msg.topic, bytes(msg.payload)))
        return client

    # paho's thread

    def _set_will(self, client: mqtt.Client, _userdata: object) -> None:
        self.boot = self._next_boot()  # before each attempt to connect
        will = {"boot": self.boot, "online": False, "detail": "lost"}
        client.will_set(
            f"{self.up}/state",
            json.dumps(will),
            qos=1,
            retain=True,
            properties=_properties(PacketTypes.WILLMESSAGE, JSON_TYPE),
        )

    def _on_connect(self, client: mqtt.Client, *_rest: object) -> None:
        for topic in (f"dev/{self.options.device}/down/+", "fleet/+"):
            client.subscribe(f"{self.root}/{topic}", qos=1)
        self.events.put(("connected", b""))

    # Own thread

    def run(self) -> None:
        self.client.connect(self.options.host, self.options.port, keepalive=20)
        self.client.loop_start()
        while True:
            try:
                event = self.events.get(timeout=CHUNK_TIMEOUT_S)
                if event is None:
                    break
                self._handle(*event)
            except queue.Empty:
                self._ask_for_chunk()
            except (DroppedError, KeyError, ValueError, struct.error) as exc:
                self.dropped.append(f"{event[0]}: {exc!r}")
        self._say("state", {"boot": self.boot, "online": False})
        self.client.disconnect()
        self.client.loop_stop()
        print(json.dumps({"dropped": self.dropped, "modules": sorted(sys.modules)}))

    def _handle(self, topic: str, payload: bytes) -> None:
        match topic.rpartition("/")[2]:
            case "connected":
                self._announce()
            case "rollout":
                self._on_offer(json.loads(payload))
            case "bundle":
                self._on_chunk(payload)
            case "allocation":
                self._on_allocation(json.loads(payload))
            case "weights":
                self._on_weights(payload)
            case "cut-gradient":
                self._on_cut_gradient(payload)

    def _announce(self) -> None:
        counts = np.bincount(self.y, minlength=self.options.classes)
        capabilities = {"backward": ["by-hand"], "precisions": ["fp32", "fp16"]}
        capabilities["orders"] = ["shuffled", "by-class"]
        birth = {
            "boot": self.boot,
            "samples": len(self.y),
            "label_counts": counts.tolist(),
            "sample_shape": list(self.x.shape[1:]),
            "capabilities": capabilities,
            "bundle": self.segment.digest if self.segment else None,
            "agent": "foreign-device/1",
        }
        self._say("birth", birth, retain=True)
        self._say("state", {"boot": self.boot, "online": True}, retain=True)

    # The bundle

    def _on_offer(self, offer: dict) -> None:
        if offer["kind"] != "offer":
            return
        if self.segment and self.segment.digest == offer["digest"]:
            self._say("rollout", {"digest": offer["digest"], "phase": "installed"})
        elif self.download is None or self.download[0]["digest"] != offer["digest"]:
            self.download = (offer, bytearray())
            self._ask_for_chunk()

    def _ask_for_chunk(self) -> None:
        if self.download is not None:
            offer, data = self.download
            wanted = {"digest": offer["digest"], "phase": "wanted", "offset_bytes": len(data)}
            self._say("rollout", wanted)

    def _on_chunk(self, payload: bytes) -> None:
        header, tensors = read_tensors(payload)
        if self.download is None or header["digest"] != self.download[0]["digest"]:
            raise DroppedError("a chunk that nobody asked for")
        offer, data = self.download
        if int(header["offset_bytes"]) != len(data):
            raise DroppedError("not the next chunk")
        data += tensors["data"].tobytes()
        if len(data) < offer["size_bytes"]:
            self._ask_for_chunk()
            return
        self.download = None
        self._install(offer["digest"], bytes(data))

    def _install(self, digest: str, data: bytes) -> None:
        try:
            if hashlib.sha256(data).hexdigest() != digest:
                raise UnusableError("the digest differs")
            self.segment = Segment(data, digest)
        except UnusableError as exc:
            self._say("rollout", {"digest": digest, "phase": "refused", "detail": str(exc)})
            return
        self._announce()
        self._say("rollout", {"digest": digest, "phase": "installed"})

    # Steps

    def _on_allocation(self, allocation: dict) -> None:
        held = self.allocation
        if held and held["run"] == allocation["run"] and allocation["plan"] < held["plan"]:
            raise DroppedError("an older plan")
        self.allocation = allocation
        self._send_activations()

    def _on_weights(self, payload: bytes) -> None:
        header, tensors = read_tensors(payload)
        if self.segment is None or header["bundle"] != self.segment.digest:
            return
        self.go = header
        self.segment.weights = {name: tensors[name] for name in self.segment.weights}
        self._send_activations()

    def _send_activations(self) -> None:
        plan, go, segment = self.allocation, self.go, self.segment
        if not (plan and go and segment) or plan["bundle"] != segment.digest:
            return
        if (go["run"], int(go["epoch"])) != (plan["run"], plan["epoch"]):
            return
        for index, (step, offset, count) in enumerate(plan["slots"]):
            slot = (plan["run"], step, offset, count)
            if step != int(go["step"]) or slot in self.answered:
                continue
            rows = self._rows(index)
            tensors = {"activations": segment.forward(self.x[rows])}
            extra: dict[str, str] = {}
            if plan["precision"] == "fp16":
                tensors, extra = in_fp16(tensors, largest_exponent=0)
            tensors["labels"] = self.y[rows]
            header = self._header(step, offset, count) | {"bundle": segment.digest} | extra
            self._publish("activations", write_tensors(tensors, header), TENSOR_TYPE)
            self.answered[slot] = rows

    def _on_cut_gradient(self, payload: bytes) -> None:
        header, tensors = read_tensors(payload)
        plan, go, segment = self.allocation, self.go, self.segment
        if not (plan and go and segment) or header["run"] != plan["run"]:
            raise DroppedError("another run")
        step, offset, count = (int(header[name]) for name in ("step", "offset", "count"))
        rows = self.answered.get((plan["run"], step, offset, count))
        if step != int(go["step"]) or rows is None:
            raise DroppedError("not a slot under way")
        gradients = segment.backward(self.x[rows], tensors["gradient"])
        extra: dict[str, str] = {}
        if plan["precision"] == "fp16":
            gradients, extra = in_fp16(gradients, largest_exponent=120)
        payload = write_tensors(gradients, self._header(step, offset, count) | extra)
        self._publish("gradients", payload, TENSOR_TYPE)

    def _rows(self, index: int) -> np.ndarray:
        """A way of our own to order the samples: another generator, read backwards."""
        plan = self.allocation
        assert plan is not None
        order = np.random.Generator(np.random.Philox(plan["seed"])).permutation(len(self.y))[::-1]
        ranges = [plan["slots"][index][1:]]
        if plan["order"] == "by-class":
            order = order[np.argsort(self.y[order], kind="stable")]
            ranges = plan["ranges"][index]
        return np.concatenate([order[offset : offset + count] for offset, count in ranges])

    def _header(self, step: int, offset: int, count: int) -> dict[str, object]:
        assert self.allocation is not None and self.go is not None  # noqa: PT018
        return {
            "run": self.allocation["run"],
            "epoch": self.allocation["epoch"],
            "step": step,
            "offset": offset,
            "count": count,
            "weights_version": self.go["version"],
        }

    def _say(self, level: str, message: dict, *, retain: bool = False) -> None:
        retain = retain or level == "state"
        self._publish(level, json.dumps(message).encode(), JSON_TYPE, retain=retain)

    def _publish(self, level: str, payload: bytes, kind: str, *, retain: bool = False) -> None:
        properties = _properties(PacketTypes.PUBLISH, kind)
        self.client.publish(f"{self.up}/{level}", payload, 1, retain, properties)


def _properties(packet: int, kind: str) -> Properties:
    properties = Properties(packet)
    properties.ContentType = kind
    properties.UserProperty = ("schema", "1")
    return properties


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=1883)
    parser.add_argument("--fleet", required=True)
    parser.add_argument("--device", required=True)
    parser.add_argument("--data", required=True, help=".npz with x and y")
    parser.add_argument("--classes", type=int, default=10)
    parser.add_argument("--boot", required=True, help="file of the boot counter")
    device = Device(parser.parse_args())
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: device.events.put(None))
    device.run()


if __name__ == "__main__":
    main()
