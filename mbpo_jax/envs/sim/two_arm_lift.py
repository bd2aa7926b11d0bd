"""robosuite's TwoArmLift: two Pandas that face each other lift a pot by its two handles.

Seen from the head camera, arm 0 is the left one. robosuite comes with the `libero` extra; it is
imported when the first environment is made, never with this module.
"""

from collections.abc import Sequence

import numpy as np

from mbpo_jax.envs.sim.simulator import (
    RobosuiteEnv,
    TaskInfo,
    check_task,
    numpy_seeded,
    prepare_robosuite,
)

SUITES = {"two_arm_lift": 1}
CAMERAS = ("agentview", "robot0_eye_in_hand", "robot1_eye_in_hand")

_INIT_STATES = 50
_INIT_STATE_STREAM = 1  # fixed initial states are drawn from (number, 1), which no seed equals
_LEVEL = np.cos(np.pi / 6)  # the pot counts as level within 30 degrees, as in robosuite's reward


def task_info(suite: str, task_id: int) -> TaskInfo:
    """Looks the task up. Raises ValueError for a suite or task that does not exist."""
    check_task(SUITES, suite, task_id)
    return TaskInfo("two_arm_lift", "lift the pot with both hands", _INIT_STATES)


class TwoArmLiftEnv(RobosuiteEnv):
    """The pot lifted 10 cm above the table and level, both handles grasped.

    Args: as `RobosuiteEnv`.
    """

    def __init__(
        self,
        suite: str = "two_arm_lift",
        task_id: int = 0,
        cameras: Sequence[str] = CAMERAS,
        image_size: int = 64,
        chunk: int = 10,
        max_steps: int = 200,
    ):
        info = task_info(suite, task_id)
        prepare_robosuite()
        import robosuite

        controller = robosuite.load_controller_config(default_controller="OSC_POSE")
        simulation = robosuite.make(
            "TwoArmLift",
            robots=["Panda", "Panda"],
            env_configuration="single-arm-opposed",
            controller_configs=controller,
            use_camera_obs=False,
            use_object_obs=False,
            has_renderer=False,
            has_offscreen_renderer=True,
            hard_reset=False,
            ignore_done=True,
        )
        super().__init__(simulation, suite, task_id, info, cameras, image_size, chunk, max_steps)

    def _restart(self, seed: int | None, init_state_id: int | None) -> None:
        with numpy_seeded(seed if init_state_id is None else (init_state_id, _INIT_STATE_STREAM)):
            self.simulation.reset()

    def _goals_now(self) -> np.ndarray:
        simulation = self.simulation
        handles = (simulation.pot.handle0_geoms, simulation.pot.handle1_geoms)
        held = [
            simulation._check_grasp(gripper=robot.gripper, object_geoms=handle)
            for robot, handle in zip(simulation.robots, handles, strict=True)
        ]
        level = self.data.xmat[simulation.pot_body_id][-1] > _LEVEL
        return np.array([*held, simulation._check_success() and level], bool)

    def _upright(self, frame: np.ndarray) -> np.ndarray:
        return frame[::-1]

    def handle(self, arm: int) -> tuple[np.ndarray, np.ndarray]:
        """Where the arm's handle is, [3], and the horizontal direction [3] away from the pot."""
        site = (self.simulation.handle0_site_id, self.simulation.handle1_site_id)[arm]
        position = self.data.site_xpos[site].copy()
        outwards = position - self.data.xpos[self.simulation.pot_body_id]
        outwards[2] = 0.0
        return position, outwards / np.linalg.norm(outwards)
