"""Leaving out of a rendering what the camera cannot see.

LIBERO's scenes have 300,000 faces and a software renderer transforms all of them for every frame,
once more for each mirror. Half are behind the camera or beside the picture. Leaving those out does
not change a pixel.
"""

import contextlib
from collections.abc import Iterator
from typing import Any

import numpy as np

_HIDDEN_GROUP = 5  # geometry groups 3 to 5 are not drawn by default
_PLANE, _BOX = 0, 6  # mjtGeom
_CORNERS = np.array([[x, y, z] for x in (-1, 1) for y in (-1, 1) for z in (-1, 1)], np.float64)
_MARGIN = 1.02  # widens the frustum, against rounding


class FrustumCulling:
    """Hides the geometries outside of a camera's view by moving them to an undrawn group.

    `enabled` is False in a scene with shadows, where unseen things show: everything is drawn.
    """

    def __init__(self, model: Any, data: Any):
        self._model, self._data = model, data
        self._groups = model.geom_group.copy()
        self._corners = model.geom_aabb[:, None, :3] + _CORNERS * model.geom_aabb[:, None, 3:]
        self._always = model.geom_type == _PLANE  # infinite, its bounding box says nothing
        # MuJoCo mirrors a scene in planes and in the upper faces of boxes, in no other shape.
        reflects = np.append(model.mat_reflectance > 0, False)[model.geom_matid]
        self._mirrors = np.flatnonzero(reflects & np.isin(model.geom_type, (_PLANE, _BOX)))
        self.enabled = not model.light_castshadow.any()

    def visible(self, camera_id: int) -> np.ndarray:
        """bool [number of geometries]: False where the bounding box is surely out of view, also in
        the mirrors that are in view."""
        data = self._data
        rotation = data.geom_xmat.reshape(-1, 3, 3)
        world = np.einsum("gij,gcj->gci", rotation, self._corners) + data.geom_xpos[:, None]
        seen = self._always | self._inside(world, camera_id)
        for mirror in self._mirrors[seen[self._mirrors]]:
            normal = rotation[mirror, :, 2]
            height = (world - data.geom_xpos[mirror]) @ normal
            if self._model.geom_type[mirror] == _BOX:
                height -= self._model.geom_size[mirror, 2]
            seen |= self._inside(world - 2 * height[..., None] * normal, camera_id)
        return seen

    def _inside(self, world: np.ndarray, camera_id: int) -> np.ndarray:
        """bool [G]: whether boxes with corners `world` [G, 8, 3] may be in a camera's frustum."""
        data = self._data
        local = (world - data.cam_xpos[camera_id]) @ data.cam_xmat[camera_id].reshape(3, 3)
        depth = -local[..., 2]  # a camera looks along its negative z axis
        reach = depth * np.tan(np.deg2rad(self._model.cam_fovy[camera_id]) / 2) * _MARGIN
        outside = (depth < 0).all(axis=1)
        for axis in (0, 1):
            outside |= (local[..., axis] > reach).all(axis=1)
            outside |= (local[..., axis] < -reach).all(axis=1)
        return ~outside

    @contextlib.contextmanager
    def view_of(self, camera_id: int) -> Iterator[None]:
        """Inside, the model is prepared for a frame from this (square) camera."""
        if self.enabled:
            drawn = self.visible(camera_id)
            self._model.geom_group[:] = np.where(drawn, self._groups, _HIDDEN_GROUP)
        try:
            yield
        finally:
            self._model.geom_group[:] = self._groups
