"""Reads what only macOS frameworks know, and prints it as JSON.

A separate program, run by its path: a wrong call costs only this process, its time is bounded, and its output can be
recorded and replayed.
    python _probe.py metal      how much memory Metal lets programs use
    python _probe.py process    heat and power mode as Foundation sees them
"""

import ctypes
import json
import sys
from typing import Any

FRAMEWORKS = "/System/Library/Frameworks/{0}.framework/{0}"


class _ObjC:
    """The part of the Objective-C runtime that is needed."""

    def __init__(self) -> None:
        self._library = ctypes.CDLL("/usr/lib/libobjc.A.dylib")
        for name in ("sel_registerName", "objc_getClass"):
            function = getattr(self._library, name)
            function.restype, function.argtypes = ctypes.c_void_p, [ctypes.c_char_p]

    def of_class(self, name: bytes) -> Any:
        return self._library.objc_getClass(name)

    def send(self, target: Any, selector: bytes, result: Any) -> Any:
        message = ctypes.CFUNCTYPE(result, ctypes.c_void_p, ctypes.c_void_p)(("objc_msgSend", self._library))
        return message(target, self._library.sel_registerName(selector))


def metal() -> dict[str, int]:
    """Return, in bytes, how much Metal recommends to keep in memory for the GPU, and its largest buffer."""
    # Without CoreGraphics, a program without a window gets no device.
    ctypes.CDLL(FRAMEWORKS.format("CoreGraphics"))
    library = ctypes.CDLL(FRAMEWORKS.format("Metal"))
    library.MTLCreateSystemDefaultDevice.restype = ctypes.c_void_p
    device = library.MTLCreateSystemDefaultDevice()
    if not device:
        raise OSError("Metal has no device")
    names = {"recommended_working_set": b"recommendedMaxWorkingSetSize", "largest_buffer": b"maxBufferLength"}
    objc = _ObjC()
    return {name: int(objc.send(device, selector, ctypes.c_uint64)) for name, selector in names.items()}


def process() -> dict[str, int]:
    """Return `NSProcessInfo`'s thermal state, 0 to 3, and whether the Mac saves power."""
    ctypes.CDLL(FRAMEWORKS.format("Foundation"))
    objc = _ObjC()
    info = objc.send(objc.of_class(b"NSProcessInfo"), b"processInfo", ctypes.c_void_p)
    return {
        "thermal_state": int(objc.send(info, b"thermalState", ctypes.c_long)),
        "low_power": int(bool(objc.send(info, b"isLowPowerModeEnabled", ctypes.c_bool))),
    }


if __name__ == "__main__":
    json.dump({"metal": metal, "process": process}[sys.argv[1]](), sys.stdout)
