"""Less detail for small frames: coarser meshes, one sample a pixel.

A software renderer's time goes into setting up triangles, twice as long with several samples a
pixel. LIBERO's scenes have 300,000, most of them smaller than a pixel of a frame of 64 or 128.
Only what the renderer holds is replaced: the model, and with it physics, stays.
"""

import contextlib
from collections.abc import Iterator
from typing import Any

import numpy as np

# How far a surface may move, in metres. A pixel of a 64-pixel head view is 13 mm on the table; a
# camera in the hand comes within 10 cm of the objects and of its gripper.
_ERROR, _FAR_ERROR = 5e-4, 2e-3
_FAR_BODIES = ("world", "robot", "mount")  # room, arm, pedestal; beginnings of the bodies' names
_LEVELS = 3  # the widest cell is 2**3 errors
_SMOOTH = 0.9  # cosine to the mean normal above which vertices may be merged in the wider cells
_SAME_POSITION = 1e-5  # metres
_FEW = 100  # faces of a mesh that is left as it is
_MESH, _DRAWN_GROUPS = 7, (1, 2)  # mjGEOM_MESH; robosuite draws these groups


def decimate(vertices: np.ndarray, faces: np.ndarray, error: float) -> np.ndarray:
    """Merges vertices that lie in one cell of a grid (vertex clustering, after Rossignac and Borrel
    1993), in wide cells where the surface is flat.

    A cell 2 errors wide is always one vertex, if its normals agree in their signs: the two sides
    of a thin wall stay apart. A cell twice (four times) as wide is one if, besides, no vertex in it
    is more than `error` off their mean plane and no normal far from theirs. All are
    replaced by the one of them that is closest to their mean, so no vertex is new.

    Args:
        vertices: float [V, 3], in metres.
        faces: int [F, 3], of vertices.
        error: metres.

    Returns:
        int [F, 3]: the faces with the vertices that remain. Two corners of a face may be one.
    """
    unique, inverse = _cells(vertices, _SAME_POSITION)
    points, corners = vertices[unique], inverse[faces]
    a, b, c = (points[corners[:, i]] for i in range(3))
    weighted = np.repeat(np.cross(b - a, c - a), 3, axis=0)
    normals = _unit(_sums(weighted, corners.ravel(), len(points)))
    remaining = np.arange(len(points))
    for level in range(_LEVELS):
        _, cell = _cells(points, 2 * error * 2**level, normals > 0)
        counts = np.bincount(cell)
        offsets = points - (_sums(points, cell) / counts[:, None])[cell]
        mean_normals = _unit(_sums(normals, cell))[cell]
        merged = np.ones(len(counts), bool)
        if level:
            flat = np.abs((offsets * mean_normals).sum(1)) <= error
            merged[cell[~(flat & ((normals * mean_normals).sum(1) >= _SMOOTH))]] = False
        order = np.lexsort(((offsets**2).sum(1), cell))
        central = order[np.concatenate([[0], np.cumsum(counts)[:-1]])]
        remaining = np.where(merged[cell], central[cell], remaining)
    return unique[remaining][corners]


def _cells(
    points: np.ndarray, width: float, signs: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Of the occupied cells a point [C] each, and each point's cell [V]."""
    keys = np.floor(points / width).astype(np.int64)
    if signs is not None:
        keys = np.concatenate([keys, signs], axis=1)
    keys -= keys.min(axis=0)
    number = np.ravel_multi_index(keys.T, keys.max(axis=0) + 1)
    _, first, cell = np.unique(number, return_index=True, return_inverse=True)
    return first, cell


def _sums(values: np.ndarray, group: np.ndarray, groups: int = 0) -> np.ndarray:
    return np.stack([np.bincount(group, column, groups) for column in values.T], axis=1)


def _unit(vectors: np.ndarray) -> np.ndarray:
    return vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-30)


class LevelOfDetail:
    """Gives a renderer a model in full or with less detail; in full while `enabled` is False."""

    def __init__(self, model: Any):
        self._model = model
        drawn = (model.geom_type == _MESH) & np.isin(model.geom_group, _DRAWN_GROUPS)
        self._errors = {}  # mesh -> error, the smallest of its geometries'
        for geom in np.flatnonzero(drawn):
            mesh = int(model.geom_dataid[geom])
            body = model.body(model.geom_bodyid[geom]).name
            error = _FAR_ERROR if body.startswith(_FAR_BODIES) else _ERROR
            if model.mesh_facenum[mesh] > _FEW:
                self._errors[mesh] = min(error, self._errors.get(mesh, error))
        self._context, self._reduced = None, False
        self.enabled = True

    def apply(self, renderer: Any, reduced: bool) -> None:
        """Prepares robosuite's render context, which must be current and is in full at first.
        Costs nothing while neither it nor `reduced` changes, else about a second."""
        reduced = reduced and self.enabled
        if renderer.con is not self._context:
            self._context, self._reduced = renderer.con, False
        if reduced != self._reduced:
            renderer.con.free()
            with self._less_detail() if reduced else contextlib.nullcontext():
                renderer._set_mujoco_context_and_buffers()
            self._context, self._reduced = renderer.con, reduced

    @contextlib.contextmanager
    def _less_detail(self) -> Iterator[None]:
        """The model as it is given to the renderer; the simulation's own again outside."""
        model, quality = self._model, self._model.vis.quality
        # A corner keeps its normal and its place in the texture.
        corners = (model.mesh_face, model.mesh_facenormal, model.mesh_facetexcoord)
        held = [array.copy() for array in (*corners, model.mesh_facenum)]
        samples = quality.offsamples
        try:
            quality.offsamples = 0
            for mesh, error in self._errors.items():
                first, start = model.mesh_vertadr[mesh], model.mesh_faceadr[mesh]
                vertices = model.mesh_vert[first : first + model.mesh_vertnum[mesh]]
                rows = slice(start, start + model.mesh_facenum[mesh])
                corners[0][rows] = decimate(vertices.astype(np.float64), corners[0][rows], error)
                a, b, c = corners[0][rows].T
                kept = start + np.flatnonzero((a != b) & (b != c) & (c != a))
                for array in corners:
                    array[start : start + len(kept)] = array[kept]
                model.mesh_facenum[mesh] = len(kept)
            yield
        finally:
            quality.offsamples = samples
            for array, values in zip((*corners, model.mesh_facenum), held):
                array[:] = values
