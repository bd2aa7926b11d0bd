"""Choosing an OpenGL that works without a screen, before the simulator is imported."""

import ctypes
import ctypes.util
import os
from collections.abc import Callable

_EGL_PLATFORM_DEVICE = 0x313F

_INSTALL = (
    "install one of them, on Debian or Ubuntu: "
    "`apt-get install libegl1 libegl-mesa0 libgl1-mesa-dri` (EGL, preferred) or "
    "`apt-get install libosmesa6` (OSMesa)"
)


def _load(name: str, fallback: str) -> ctypes.CDLL:
    return ctypes.CDLL(ctypes.util.find_library(name) or fallback, mode=ctypes.RTLD_GLOBAL)


def egl_works() -> bool:
    """Whether an EGL display can be initialised on some device (a GPU's or Mesa's own)."""
    try:
        egl = _load("EGL", "libEGL.so.1")
        find = egl.eglGetProcAddress
        initialize = egl.eglInitialize
    except (OSError, AttributeError):
        return False
    find.restype = ctypes.c_void_p
    find.argtypes = [ctypes.c_char_p]
    addresses = [find(b"eglQueryDevicesEXT"), find(b"eglGetPlatformDisplayEXT")]
    if None in addresses:
        return False
    query = ctypes.CFUNCTYPE(ctypes.c_uint, ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p)
    display_of = ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_uint, ctypes.c_void_p, ctypes.c_void_p)
    initialize.restype = ctypes.c_uint
    initialize.argtypes = [ctypes.c_void_p] * 3
    devices = (ctypes.c_void_p * 16)()
    count = ctypes.c_int()
    if not query(addresses[0])(len(devices), devices, ctypes.byref(count)):
        return False
    displays = (
        display_of(addresses[1])(_EGL_PLATFORM_DEVICE, device, None)
        for device in devices[: count.value]
    )
    return any(display and initialize(display, None, None) for display in displays)


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
    already set is tried alone. Raises RuntimeError with the packages to install if none works.
    """
    wanted = os.environ.get("MUJOCO_GL", "").lower()
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
