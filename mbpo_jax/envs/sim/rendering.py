"""Choosing an OpenGL that works without a screen, before the simulator is imported."""

import ctypes
import ctypes.util
import functools
import os
from collections.abc import Callable

DEVICE = "MUJOCO_EGL_DEVICE_ID"

_EGL_PLATFORM_DEVICE = 0x313F

_INSTALL = (
    "install one of them, on Debian or Ubuntu: "
    "`apt-get install libegl1 libegl-mesa0 libgl1-mesa-dri` (EGL, preferred) or "
    "`apt-get install libosmesa6` (OSMesa)"
)


def _load(name: str, fallback: str) -> ctypes.CDLL:
    return ctypes.CDLL(ctypes.util.find_library(name) or fallback, mode=ctypes.RTLD_GLOBAL)


def egl_devices() -> list[Callable[[], bool]]:
    """For each EGL device (a GPU's or Mesa's own) in EGL's order, whether a display of it can be
    initialised; empty without EGL."""
    try:
        egl = _load("EGL", "libEGL.so.1")
        find = egl.eglGetProcAddress
        initialize = egl.eglInitialize
    except (OSError, AttributeError):
        return []
    find.restype = ctypes.c_void_p
    find.argtypes = [ctypes.c_char_p]
    addresses = [find(b"eglQueryDevicesEXT"), find(b"eglGetPlatformDisplayEXT")]
    if None in addresses:
        return []
    query = ctypes.CFUNCTYPE(ctypes.c_uint, ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p)
    display_of = ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_uint, ctypes.c_void_p, ctypes.c_void_p)
    initialize.restype = ctypes.c_uint
    initialize.argtypes = [ctypes.c_void_p] * 3
    devices = (ctypes.c_void_p * 16)()
    count = ctypes.c_int()
    if not query(addresses[0])(len(devices), devices, ctypes.byref(count)):
        return []

    def works(device: int) -> bool:
        display = display_of(addresses[1])(_EGL_PLATFORM_DEVICE, device, None)
        return bool(display and initialize(display, None, None))

    return [functools.partial(works, device) for device in devices[: count.value]]


def egl_works() -> bool:
    """Whether EGL can draw; sets MUJOCO_EGL_DEVICE_ID to the device on which it does.

    That is the one that the variable names; else the first of CUDA_VISIBLE_DEVICES, where EGL has a
    device of that number; else the first that works: CUDA may hide all its devices, and may name
    them by what EGL does not know.

    Raises:
        RuntimeError: MUJOCO_EGL_DEVICE_ID is set and no device that works.
    """
    devices = egl_devices()
    asked = os.environ.get(DEVICE, "").strip()
    if asked and devices:
        if not (asked.isdecimal() and int(asked) < len(devices) and devices[int(asked)]()):
            raise RuntimeError(
                f"{DEVICE}={asked} is no EGL device that works: there are {len(devices)}, numbered "
                "from 0 in EGL's own order. Set it to one of them, or unset it and the first that "
                "works is taken"
            )
        order = [int(asked)]
    else:
        visible = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")[0].strip()
        preferred = [int(visible)] if visible.isdecimal() and int(visible) < len(devices) else []
        order = [*preferred, *range(len(devices))]
    for number in order:
        if devices[number]():
            os.environ[DEVICE] = str(number)
            return True
    return False


def osmesa_works() -> bool:
    """Whether Mesa's software renderer can be loaded."""
    try:
        _load("OSMesa", "libOSMesa.so.8")
    except OSError:
        return False
    return True


BACKENDS: dict[str, Callable[[], bool]] = {"egl": egl_works, "osmesa": osmesa_works}


def select_backend() -> str:
    """Sets MUJOCO_GL and PYOPENGL_PLATFORM to the first of egl and osmesa that works.

    Must run before mujoco, robosuite or PyOpenGL is imported. A MUJOCO_GL of egl or osmesa that is
    already set is tried alone. Raises RuntimeError with the packages to install if none works, and
    as `egl_works`.
    """
    wanted = os.environ.get("MUJOCO_GL", "").strip().lower()
    candidates = [wanted] if wanted in BACKENDS else list(BACKENDS)
    for name in candidates:
        if BACKENDS[name]():
            os.environ["MUJOCO_GL"] = os.environ["PYOPENGL_PLATFORM"] = name
            return name
    asked = f" (MUJOCO_GL={wanted} asks for it)" if wanted in BACKENDS else ""
    raise RuntimeError(
        f"no working OpenGL for rendering without a screen: tried {', '.join(candidates)}{asked}; "
        f"{_INSTALL}."
    )
