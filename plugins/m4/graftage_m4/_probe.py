"""Asks macOS what only its frameworks know, and prints it as JSON. Run as a program of its own, by its path.

In a child process a wrong call costs that child, the time is bounded, and the answer can be recorded and replayed.
    python _probe.py metal      what Metal lets programs use of the memory
    python _probe.py process    heat and power mode as Foundation sees them
"""

import ctypes
import json
import sys
from typing import Any

FRAMEWORKS = "/System/Library/Frameworks/{0}.framework/{0}"


class _ObjC:
    """The little of the Objective-C runtime that is needed."""

    def __init__(self) -> None:
        self._library = ctypes.CDLL("/usr/lib/libobjc.A.dylib")
        for name in ("sel_registerName", "objc_getClass"):
            function = getattr(self._library, name)
            function.restype, function.argtypes = ctypes.c_void_p, [ctypes.c_char_p]

    def of_class(self, name: bytes) -> Any:
        return self._library.objc_getClass(name)

    def send(self, target: Any, selector: bytes, answers: Any) -> Any:
        message = ctypes.CFUNCTYPE(answers, ctypes.c_void_p, ctypes.c_void_p)(("objc_msgSend", self._library))
        return message(target, self._library.sel_registerName(selector))


def metal() -> dict[str, int]:
    """What Metal recommends as the most that programs keep in memory for the GPU, and its largest buffer; bytes."""
    ctypes.CDLL(FRAMEWORKS.format("CoreGraphics"))  # Without it a program with no window gets no device.
    library = ctypes.CDLL(FRAMEWORKS.format("Metal"))
    library.MTLCreateSystemDefaultDevice.restype = ctypes.c_void_p
    device = library.MTLCreateSystemDefaultDevice()
    if not device:
        raise OSError("Metal has no device")
    names = {"recommended_working_set": b"recommendedMaxWorkingSetSize", "largest_buffer": b"maxBufferLength"}
    objc = _ObjC()
    return {name: int(objc.send(device, selector, ctypes.c_uint64)) for name, selector in names.items()}


def process() -> dict[str, int]:
    """`NSProcessInfo`: its thermal state, 0 to 3, and whether the Mac saves power."""
    ctypes.CDLL(FRAMEWORKS.format("Foundation"))
    objc = _ObjC()
    info = objc.send(objc.of_class(b"NSProcessInfo"), b"processInfo", ctypes.c_void_p)
    return {
        "thermal_state": int(objc.send(info, b"thermalState", ctypes.c_long)),
        "low_power": int(bool(objc.send(info, b"isLowPowerModeEnabled", ctypes.c_bool))),
    }


if __name__ == "__main__":
    json.dump({"metal": metal, "process": process}[sys.argv[1]](), sys.stdout)
