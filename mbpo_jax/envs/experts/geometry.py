"""Grasps and placements from the collision geometry of a scene. Lengths in metres."""

import dataclasses
from typing import Any

import numpy as np

_MESH, _SPHERE, _CAPSULE, _CYLINDER = 7, 2, 3, 5  # mjtGeom
_GRIPPER_WIDTH = 0.0775  # widest thing that fits between the open fingers
# Of the open hand: where its fingers are, half extents of a finger and of the palm across and along
# it with 5 mm of room, and how high above the fingertips the palm begins.
_OPENED, _FINGER, _PALM = 0.046, (0.012, 0.016), (0.105, 0.035, 0.035)
_WIDE = 0.065  # what is wider is better held otherwise than across all of it
_HANDLE = 0.025  # how far a handle stands out at least
_BESIDE = 0.10  # how far from something high the hand can take an object from above
_FREE = 0.09  # how far from everything else an object is set down
_SPACING = 0.01  # of the points that stand for a surface


@dataclasses.dataclass(frozen=True)
class Grasp:
    """Where the point between the fingertips goes, and by which angle the hand turns about the
    vertical (0: fingers open along the world's y axis). `tolerance`: how near is near enough."""

    position: np.ndarray
    yaw: float
    tolerance: float


def opening_axis(yaw: float) -> np.ndarray:
    """Unit vector [2] along which the fingers open."""
    return np.array([-np.sin(yaw), np.cos(yaw)])


def _geom_points(model: Any, geom: int) -> np.ndarray:
    kind, size = model.geom_type[geom], model.geom_size[geom]
    if kind == _MESH:
        mesh = model.geom_dataid[geom]
        start = model.mesh_vertadr[mesh]
        return model.mesh_vert[start : start + model.mesh_vertnum[mesh]]
    if kind in (_CYLINDER, _CAPSULE):
        angle = np.linspace(0, 2 * np.pi, 24, endpoint=False)
        ring = np.stack([np.cos(angle), np.sin(angle)], axis=1) * size[0]
        return np.concatenate(
            [np.column_stack([ring, np.full(len(ring), z)]) for z in (-size[1], 0.0, size[1])]
        )
    half = np.full(3, size[0]) if kind == _SPHERE else size
    counts = np.clip(np.ceil(2 * half / _SPACING), 1, 24).astype(int) + 1
    axes = [np.linspace(-1, 1, count) for count in counts]
    grid = np.stack(np.meshgrid(*axes), axis=-1).reshape(-1, 3)
    return grid[np.abs(grid).max(axis=1) == 1] * half


def body_points(model: Any, data: Any, root: int, subtree: bool = True) -> np.ndarray:
    """World points [N, 3] on the collision surfaces of a body (and of what hangs on it)."""
    bodies = {root}
    if subtree:
        for body in range(root + 1, model.nbody):
            if model.body_parentid[body] in bodies:
                bodies.add(body)
    points = [
        _geom_points(model, geom) @ data.geom_xmat[geom].reshape(3, 3).T + data.geom_xpos[geom]
        for geom in range(model.ngeom)
        if model.geom_bodyid[geom] in bodies
        and (model.geom_contype[geom] or model.geom_conaffinity[geom])
    ]
    return np.concatenate(points) if points else np.zeros((0, 3))


def _extent(points: np.ndarray, yaw: float) -> tuple[float, float]:
    along = points[:, :2] @ opening_axis(yaw)
    return along.min(), along.max()


def plan_grasp(points: np.ndarray, obstacles: np.ndarray, attempt: int = 0) -> Grasp:
    """A grasp from above of the object with surface `points` [N, 3].

    Narrow objects are pinched across their least width, others by their rim on the side with most
    room, or by their handle if they are shut above; the hand turns as little as that allows.
    `attempt` counts failed grasps: a rim grasp is then tried elsewhere, a pinch deeper.
    """
    low, high = points.min(axis=0), points.max(axis=0)
    height = high[2] - low[2]
    middle = (low + high)[:2] / 2
    near = obstacles[np.linalg.norm(obstacles[:, :2] - middle, axis=1) < 0.25]
    least, centre, yaw = _pinch(points, near)
    if least > _WIDE and attempt < 2 and _is_shut(points):
        outward = _handle_direction(points)
        if outward is not None:
            held = plan_handle_grasp(points, outward)
            return Grasp(held, yaw_along(np.cross(outward, [0.0, 0.0, 1.0])), 0.008)
    if least < _GRIPPER_WIDTH:
        depth = min(0.03 + 0.01 * attempt, 0.5 * height)
        slack = (_GRIPPER_WIDTH - least) / 2
        height = max(high[2] - depth, low[2] + 0.008)
        return Grasp(np.array([*centre, height]), yaw, float(np.clip(slack / 2, 0.006, 0.012)))
    depth = min(0.025, 0.5 * height)
    height = max(high[2] - depth, low[2] + 0.008)
    centre, yaw = _rim_grasp(points, near, height, attempt)
    return Grasp(np.array([*centre, height]), yaw, 0.006)


def highest_between(points: np.ndarray, start: np.ndarray, end: np.ndarray) -> float:
    """The greatest height of points [N, 3] that a hand passes on its straight way between two
    places [2], -inf if there are none."""
    way = end - start
    share = (points[:, :2] - start) @ way / max(way @ way, 1e-9)
    nearest = start + np.clip(share, 0, 1)[:, None] * way
    passed = np.linalg.norm(points[:, :2] - nearest, axis=1) < 0.08
    return points[passed, 2].max(initial=-np.inf)


def _pinch(points: np.ndarray, obstacles: np.ndarray) -> tuple[float, np.ndarray, float]:
    """Width, centre [2] and yaw of the best pinch: across the least width, with little turning, and
    where the hand finds no obstacles, then in the middle of the object."""
    low, high = points.min(axis=0), points.max(axis=0)
    height = high[2] - min(0.03, 0.5 * (high[2] - low[2]))
    choices = []
    for yaw in np.linspace(-np.pi / 2, np.pi / 2, 73):
        axis, along = opening_axis(yaw), opening_axis(yaw - np.pi / 2)
        ends = _extent(points, yaw)
        width, length = np.ptp(ends), np.ptp(points[:, :2] @ along)
        centre = (low + high)[:2] / 2
        centre = centre + axis * (sum(ends) / 2 - centre @ axis)
        for shift in (0.0, -0.25, 0.25) if width < _GRIPPER_WIDTH else (0.0,):
            spot = centre + along * shift * length
            cost = width + 0.01 * abs(yaw) + 0.2 * abs(shift * length)
            if width < _GRIPPER_WIDTH:
                cost += 5 * _crowding(obstacles, spot, height, yaw)
            choices.append((cost, width, spot, float(yaw)))
    return min(choices, key=lambda choice: choice[0])[1:]


def _crowding(obstacles: np.ndarray, centre: np.ndarray, height: float, yaw: float) -> float:
    """How deep obstacles [N, 3] reach into an open hand whose fingertips are at a centre [2] and
    height."""
    offset = obstacles - [*centre, height]
    across = offset[:, :2] @ opening_axis(yaw)
    along = np.abs(offset[:, :2] @ opening_axis(yaw - np.pi / 2))
    finger = np.minimum(_FINGER[0] - np.abs(np.abs(across) - _OPENED), _FINGER[1] - along)
    palm = np.minimum(_PALM[0] - np.abs(across), _PALM[1] - along)
    depths = (finger[offset[:, 2] > -0.015], palm[offset[:, 2] > _PALM[2]])
    return float(sum(depth.max(initial=0.0) for depth in depths))


def _is_shut(points: np.ndarray) -> bool:
    """Whether an object has something in its middle where one with a rim is hollow."""
    middle = (points.min(axis=0) + points.max(axis=0))[:2] / 2
    high = points[points[:, 2] > points[:, 2].max() - 0.03]
    return bool((np.linalg.norm(high[:, :2] - middle, axis=1) < 0.03).any())


def _handle_direction(points: np.ndarray) -> np.ndarray | None:
    """The horizontal unit vector [3] along which something narrow stands out furthest."""
    centre, best = points.mean(axis=0), (0.0, None)
    for angle in np.arange(36) * np.pi / 18:
        way = np.array([np.cos(angle), np.sin(angle), 0.0])
        along = (points - centre) @ way
        across = points[along > along.max() - _HANDLE] @ np.cross(way, [0.0, 0.0, 1.0])
        if np.ptp(across) < 0.04 and along.max() > best[0]:
            best = along.max(), way
    return best[1]


def plan_handle_grasp(points: np.ndarray, outward: np.ndarray) -> np.ndarray:
    """Where [3] the fingertips hold an object with surface `points` [N, 3] by what stands out along
    a horizontal unit vector [3], such as a mug's handle."""
    along = points @ outward
    handle = points[along > along.max() - _HANDLE]
    middle = (handle.min(axis=0) + handle.max(axis=0)) / 2
    return middle + outward * (along.max() - 0.015 - middle @ outward)


def _rim_grasp(
    points: np.ndarray, obstacles: np.ndarray, height: float, attempt: int
) -> tuple[np.ndarray, float]:
    middle = (points.min(axis=0) + points.max(axis=0))[:2] / 2
    top = points[points[:, 2] > points[:, 2].max() - 0.02]
    tall = obstacles[obstacles[:, 2] > points[:, 2].max() - 0.05]
    choices = []
    for yaw in np.arange(-5, 6) * np.pi / 12:
        for side in (1.0, -1.0):
            axis = side * opening_axis(yaw)
            radius = (top[:, :2] @ axis).max() - middle @ axis
            finger = middle + axis * (radius + 0.03)
            room = np.linalg.norm(tall[:, :2] - finger, axis=1).min() if len(tall) else 1.0
            spot = middle + axis * (radius - 0.008)
            cost = 0.02 * abs(yaw) - min(room, 0.06) + 5 * _crowding(obstacles, spot, height, yaw)
            choices.append((cost, yaw, spot))
    choices.sort(key=lambda choice: choice[0])
    _, yaw, centre = choices[attempt % len(choices)]
    return centre, float(yaw)


@dataclasses.dataclass(frozen=True)
class Placement:
    """Where a held object's origin is taken, `spot` [2] and `height`, with the hand at `yaw`;
    `lift`: how much higher it travels; `climb`: how far it rises before it travels."""

    spot: np.ndarray
    height: float
    yaw: float
    lift: float
    climb: float = 0.04


def rotation_about(axis: np.ndarray, angle: float) -> np.ndarray:
    """The rotation [3, 3] by an angle about a unit vector [3]."""
    x, y, z = axis
    cross = np.array([[0, -z, y], [z, 0, -x], [-y, x, 0]])
    return np.eye(3) + np.sin(angle) * cross + (1 - np.cos(angle)) * cross @ cross


def rotation_about_vertical(angle: float) -> np.ndarray:
    cos, sin = np.cos(angle), np.sin(angle)
    return np.array([[cos, -sin, 0], [sin, cos, 0], [0, 0, 1]])


def yaw_along(direction: np.ndarray) -> float:
    """The yaw from -pi/2 to pi/2 at which the fingers open along a horizontal vector [3]."""
    return float((np.arctan2(-direction[0], direction[1]) + np.pi / 2) % np.pi - np.pi / 2)


def leaning(rotation: np.ndarray, towards: np.ndarray, angle: float) -> np.ndarray:
    """A hand's `rotation` [3, 3] leant over: its back goes towards a horizontal unit vector
    [3]."""
    return rotation_about(np.cross([0.0, 0.0, 1.0], towards), angle) @ rotation


def plan_insertion(
    shape: np.ndarray,
    palm: np.ndarray,
    yaw: float,
    container: np.ndarray,
    rim: float,
    centre: np.ndarray,
    half: np.ndarray,
) -> Placement:
    """How to lower an object into a region of a container so that it and the hand touch no wall.

    shape, palm: surface points [N, 3] of the object and of the hand above the fingertips, relative
    to the object's origin, held at `yaw`; container: surface points [W, 3]; rim: the height of the
    region's upper edge; centre, half: [3], the region in which the origin must be. The object is
    let go with its lower end 3 to 5 cm below the rim and falls to the region's floor: walls up to
    the rim meet what is below it then, higher ones all of the object. The spot and the hand's yaw
    (in steps of 15 degrees) leave 1.2 cm of room if possible; then little turning and a central
    spot are preferred.
    """
    depth = np.clip(np.ptp(shape[:, 2]) / 2, 0.03, 0.05)
    height = rim - depth - shape[:, 2].min()
    above = container[:, 2] > rim
    low = []
    rest = min(height, centre[2] - half[2] - shape[:, 2].min())
    for part, lowest in ((shape, rest), (palm, height)):
        sunk = part[part[:, 2] < rim - lowest]
        for met, side in ((sunk, container[~above]), (part, container[above])):
            walls = _walls(side, met, height, centre, half) if len(met) else met
            low += [(met, walls)] if len(walls) else []
    if not low:
        return Placement(centre[:2], height, yaw, depth + 0.025)
    grid = np.linspace(-1, 1, 21)
    offsets = np.stack(np.meshgrid(grid, grid), axis=-1).reshape(-1, 2)
    offsets = offsets * np.maximum(half[:2] - 0.012, 0)
    best = (np.inf, centre[:2], yaw)
    for candidate in np.arange(-6, 7) * np.pi / 12:
        turn = rotation_about_vertical(candidate - yaw)
        rooms = [_room((part @ turn.T)[:, :2], walls, centre[:2] + offsets) for part, walls in low]
        cost = np.linalg.norm(offsets, axis=1) - 10 * np.minimum(np.min(rooms, axis=0), 0.012)
        cost += 0.02 * abs(candidate - yaw)
        if cost.min() < best[0]:
            best = (cost.min(), centre[:2] + offsets[np.argmin(cost)], float(candidate))
    return Placement(best[1], height, best[2], depth + 0.025)


def _walls(
    container: np.ndarray, part: np.ndarray, height: float, centre: np.ndarray, half: np.ndarray
) -> np.ndarray:
    """The wall points [W, 2] that a part of what is held at `height` can touch in a region."""
    walls = container[container[:, 2] > height + part[:, 2].min()][:, :2]
    reach = half[:2].max() + np.linalg.norm(part[:, :2], axis=1).max()
    walls = walls[np.linalg.norm(walls - centre[:2], axis=1) < reach + 0.02]
    return np.unique(np.round(walls, 3), axis=0)


def clear_spot(
    spot: np.ndarray, drawer: np.ndarray, outward: np.ndarray, obstacles: np.ndarray
) -> np.ndarray | None:
    """The nearest free place [2] for an object at `spot`, where an open drawer is not in the way of
    the hand; None if it is not where the object is.

    drawer, obstacles: surface points [N, 3] of the drawer when it will be open, and of all else;
    outward: the horizontal unit vector [3] along which it opens.
    """
    spot, outward = spot[:2], outward[:2]
    along = np.array([-outward[1], outward[0]])
    missing = (drawer[:, :2] @ outward).max() + _BESIDE - spot @ outward
    if missing <= 0 or np.abs((drawer[:, :2] - spot) @ along).min() > _BESIDE:
        return None
    ways = [(out, side) for out in np.arange(4) * 0.03 for side in np.arange(-5, 6) * 0.03]
    spots = [spot + outward * (missing + out) + along * side for out, side in ways]
    room = [np.linalg.norm(obstacles[:, :2] - x, axis=1).min(initial=_FREE) for x in spots]
    cost = [np.hypot(*way) - 10 * free for way, free in zip(ways, room)]
    return spots[int(np.argmin(cost))]


@dataclasses.dataclass(frozen=True)
class Mouth:
    """The way into a region with a roof: its `middle` [3] inside, and the horizontal unit vector
    [3] that leads out."""

    middle: np.ndarray
    outward: np.ndarray


def find_mouth(container: np.ndarray, centre: np.ndarray, half: np.ndarray) -> Mouth | None:
    """The way into a region, None if it is open above.

    container: surface points [W, 3] of what stands still around it; centre, half: [3].
    """
    inside = np.abs(container - centre) < 0.6 * half
    if not (inside[:, :2].all(axis=1) & (container[:, 2] > centre[2] + 0.5 * half[2])).any():
        return None

    def ahead(way: np.ndarray) -> np.ndarray:
        """How far the walls that one meets on the way out are."""
        across = inside[:, way == 0].all(axis=1)
        distance = (container - centre) @ way
        return distance[across & (distance > 0)]

    outward = min(
        (sign * way for way in np.eye(3)[:2] for sign in (1, -1)), key=lambda w: len(ahead(w))
    )
    side = np.cross(outward, [0.0, 0.0, 1.0])
    right, left = (ahead(way).min(initial=half[:2].max()) for way in (side, -side))
    return Mouth(centre + side * (right - left) / 2, outward)


def _room(footprint: np.ndarray, walls: np.ndarray, spots: np.ndarray) -> np.ndarray:
    """Distance [S] from the convex outline of a footprint at each spot to the nearest wall point,
    negative where they overlap. Outline in 24 directions."""
    angles = np.linspace(0, 2 * np.pi, 24, endpoint=False)
    normals = np.stack([np.cos(angles), np.sin(angles)], axis=1)
    support = (footprint @ normals.T).max(axis=0)
    outside = (walls @ normals.T)[None] - (spots @ normals.T + support)[:, None]
    return outside.max(axis=-1).min(axis=-1)
