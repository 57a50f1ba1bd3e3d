"""The environment in the real simulator: geometry, success and reward by real contacts, episodes fixed by their id."""

import contextlib
import os
import signal
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from common.simulation.env import CAMERA, PutOnReceptacleEnv, make_env
from common.simulation.expert import Expert
from common.simulation.vec_env import decode_gripper, make_envs

BRIDGE = pytest.param(
    "bridge",
    marks=pytest.mark.skipif("MS_ASSET_DIR" not in os.environ, reason="MS_ASSET_DIR is not set: no bridge assets"),
)


@pytest.fixture(scope="module")
def env():
    """One environment in this process, primitive pack."""
    env = make_env(assets="primitive")
    yield env
    env.close()


@pytest.fixture(scope="module")
def four_envs():
    envs = make_envs(num_envs=4, num_workers=2)
    yield envs
    envs.close()


def drive(envs, episode_ids, steps):
    """Expert episodes: all images (T+1, N, H, W, 3), summed rewards (N,), last infos."""
    expert = Expert(envs.num_envs)
    images, _ = envs.reset(episode_ids)
    frames, total = [images], np.zeros(envs.num_envs, np.float32)
    for _ in range(steps):
        images, rewards, dones, infos = envs.step(expert.act(envs.privileged_state()))
        frames.append(images)
        total += rewards
    return np.stack(frames), total, infos


def image(obs):
    return obs["sensor_data"][CAMERA]["rgb"][0].numpy()


@pytest.mark.parametrize("assets", ["primitive", BRIDGE])
def test_nominal_pose_and_camera(assets):
    """Stops a wrong base pose, joint order, camera mount or intrinsics: each shifts what a policy sees."""
    env = make_env(assets=assets)
    env.reset(options={"episode_ids": [0]})
    np.testing.assert_allclose(env.privileged_state()["tcp_pose"][0, :3], (-0.1451, 0.0341, 1.0053), atol=2e-4)
    camera = env.scene.sensors[CAMERA].camera
    world_to_camera = camera.get_extrinsic_matrix()[0].numpy()
    scaled = camera.get_intrinsic_matrix()[0].numpy() * [[4.0], [4.0], [1.0]]  # at 160x120; compare at 640x480

    def project(x, y, z=0.87):
        u, v, w = scaled @ (world_to_camera @ [x, y, z, 1.0])[:3]
        return u / w, v / w

    np.testing.assert_allclose(project(-0.185, 0.005), (319.501, 239.545), atol=2.0)
    corners = np.array([project(x, y) for x in (-0.235, -0.085) for y in (-0.075, 0.075)])
    np.testing.assert_allclose(corners.min(0), (169, 179), atol=1.5)
    np.testing.assert_allclose(corners.max(0), (421, 360), atol=1.5)
    env.close()


def test_scripted_episodes_reach_the_full_return(four_envs):
    """Stops success or reward that real contacts do not produce: grasp, hold and place pay 0.1 + 0.1 + 1."""
    _, total, infos = drive(four_envs, np.array([0, 131072, 262144, 400000]), 36)
    assert infos["success"].all() and infos["held"].all(), infos
    np.testing.assert_allclose(total, 1.2, atol=1e-5)
    np.testing.assert_allclose(infos["return"], 1.2, atol=1e-5)


def test_losing_success_costs_one(env):
    """Stops sticky success: the object pushed off the receptacle takes back the reward of 1."""
    expert = Expert(1)
    env.reset(options={"episode_ids": [0]})
    for _ in range(36):
        _, reward, _, _, info = env.step(decode_gripper(expert.act(env.privileged_state())))
    assert info["success"].item()
    pose = env._pose("object").clone()
    pose[:, 0] -= 0.15  # off the plate, onto the table
    env._teleport_object(pose, keep_velocity=False)
    _, reward, _, _, info = env.step(np.array([[0, 0, 0, 0, 0, 0, 1.0]], np.float32))
    assert not info["success"].item() and info["success_once"].item()
    assert reward.item() == pytest.approx(-1.0)


def test_idle_arm_pays_nothing(env):
    """Stops reward without a grasp, the reference's protection against free successes, on the plate too."""
    env.reset(options={"episode_ids": [777]})
    idle = np.array([[0, 0, 0, 0, 0, 0, 1.0]], np.float32)
    assert [env.step(idle)[1].item() for _ in range(5)] == [0.0] * 5
    pose = env._pose("object").clone()
    pose[:, :2], pose[:, 2] = env._pose("plate")[:, :2], pose[:, 2] + 0.02
    env._teleport_object(pose, keep_velocity=False)
    rewards, infos = zip(*(env.step(idle)[1::3] for _ in range(8)), strict=True)
    assert infos[-1]["success"].item() and not infos[-1]["grasped"].item() and sum(rewards).item() == 0


class Judged:
    """`evaluate` of the environment with planted poses and forces: half extents 5.5 cm of the plate, 1.7 of the object.

    x, z: metres from plate to object; touch: newtons between them; grip: newtons and degrees of either finger's push.
    """

    def __init__(self):
        env = self.env = object.__new__(PutOnReceptacleEnv)
        env.num_envs, env.device, env.fidelity, env._grasp_count = 1, torch.device("cpu"), "fixed", np.zeros(1, int)
        env._ever = {key: np.zeros(1, bool) for key in ("grasped", "held", "success")}
        env.plate_half, env.object_half = np.array([[0.055, 0.055, 0.003]]), np.array([[0.017, 0.017, 0.017]])
        link = lambda sign: SimpleNamespace(sign=sign, pose=SimpleNamespace(raw_pose=torch.eye(7)[3:4]))  # noqa: E731
        env.agent = SimpleNamespace(finger1_link=link(1.0), finger2_link=link(-1.0))
        env.scene = SimpleNamespace(get_pairwise_contact_forces=self.force)
        env._for_selected = lambda which, function: function(which)
        env._pose = lambda which: torch.tensor([[self.x, 0.0, self.z] if which == "object" else [0.0, 0.0, 0.0]])

    def force(self, one, other):
        if other == "plate":
            return torch.tensor([[0.0, 0.0, self.touch]])
        newtons, degrees = self.grip[0 if one.sign > 0 else -1], np.deg2rad(self.grip[1])
        return torch.tensor([[newtons * np.sin(degrees), newtons * np.cos(degrees) * one.sign, 0.0]])

    def __call__(self, x=0.0, z=0.02, touch=0.0, grip=(0.0, 0.0, 0.0)):
        self.x, self.z, self.touch, self.grip = x, z, touch, grip
        return {key: value.item() for key, value in self.env.evaluate().items()}


def test_thresholds_of_success_and_grasp():
    """Stops a looser measure, which every policy would enjoy: just inside and just outside of every limit."""
    # The plate's half extent + 1 cm; 5 cm between the bodies; above the plate; in contact with more than .03 N.
    placed = [(0.064, 0.02, 0.04), (0.066, 0.02, 0.04), (0, 0.069, 0.04), (0, 0.071, 0.04), (0, -0.001, 0.04)]
    placed += [(0, 0.02, 0.031), (0, 0.02, 0.029)]
    assert [Judged()(*case)["success"] for case in placed] == [True, False, True, False, False, True, False]
    # Both fingers push with .5 N or more, within 85 degrees of their closing direction.
    grips = [(1, 84, 1), (1, 86, 1), (0.49, 0, 1), (0.51, 0, 0.51), (1, 0, 0.49), (0, 0, 0)]
    assert [Judged()(grip=grip)["grasped"] for grip in grips] == [True, False, False, True, False, False]
    judged = Judged()
    assert [judged(grip=(1, 0, 1))["held"] for _ in range(5)] == [False] * 4 + [True], "held: five steps in a row"
    judged = Judged()
    assert not any(judged(grip=(step != 3, 0, 1))["held"] for step in range(8)), "in a row"


def test_target_pose_accumulates(env):
    """Stops deltas applied to the measured instead of the previous target pose (the published controller's choice)."""
    env.reset(options={"episode_ids": [5]})
    start = env.privileged_state()["tcp_target_pose"][0]
    for _ in range(3):
        env.step(np.array([[0.01, 0, 0.005, 0, 0, 0.1, 1.0]], np.float32))
    for _ in range(3):
        env.step(np.array([[0, 0, 0, 0, 0, 0, 1.0]], np.float32))  # the arm catches up with its target
    state = env.privileged_state()
    moved = state["tcp_target_pose"][0, :3] - start[:3]
    np.testing.assert_allclose(moved, (-0.03, 0, 0.015), atol=1e-5)  # base axes are turned by 180 degrees
    np.testing.assert_allclose(state["tcp_pose"][0, :3], state["tcp_target_pose"][0, :3], atol=0.004)


def test_cpu_controller_equals_maniskill(env):
    """Stops the numpy controller from drifting away from ManiSkill's own: same drive targets for the same actions."""
    targets = []
    for set_action in (type(env.agent).set_action, super(type(env.agent).__mro__[1], env.agent).set_action.__func__):
        env.reset(options={"episode_ids": [9]})
        for action in ((0.02, -0.01, -0.03, 0.02, -0.03, 0.2, 1.0), (0.0, 0.02, -0.02, 0.0, 0.05, -0.3, -1.0)):
            set_action(env.agent, torch.tensor([action]))
            for _ in range(env._sim_steps_per_control):
                env.scene.step()
        targets.append([float(joint._objs[0].drive_target[0]) for joint in env.agent.robot.active_joints])
    np.testing.assert_allclose(targets[0], targets[1], atol=1e-4)


def test_gpu_controller_converges(env):
    """Stops the GPU's controller, whose solver makes one step, from being another one than the CPU's: same targets."""
    arm = env.agent.controller.controllers["arm"]
    kinematics, (cpu, once, twice) = arm.kinematics, ([], [], [])
    for action in ((0.02, -0.01, -0.04, 0.02, -0.03, 0.2, 1.0), (0.0, 0.04, 0.0, 0.0, 0.05, -0.3, -1.0)):
        env.reset(options={"episode_ids": [9]})
        super(type(env.agent).__mro__[1], env.agent).set_action(torch.tensor([action]))
        cpu.append(arm._target_qpos[0].tolist())
        env.reset(options={"episode_ids": [9]})
        saved = dict(vars(kinematics))
        kinematics._setup_gpu()  # ManiSkill's solver for the GPU, which runs on any device
        try:
            super(type(env.agent).__mro__[1], env.agent).set_action(torch.tensor([action]))
            once.append(arm._target_qpos[0].tolist())
            env.agent.converge()
            twice.append(arm._target_qpos[0].tolist())
        finally:
            vars(kinematics).update(saved)
    assert np.abs(np.subtract(once, cpu)).max() > 5e-3  # rad
    np.testing.assert_allclose(twice, cpu, atol=5e-4)


def test_gpu_controller_holds_beyond_reach(env):
    """Stops an arm that explores outward from sweeping the table on the GPU alone, whose solver cannot fail."""
    arm = env.agent.controller.controllers["arm"]
    low, high = env.agent.robot.get_qlimits()[0, :6].T
    moves = []
    for gpu in (False, True):
        env.reset(options={"episode_ids": [9]})
        saved = dict(vars(arm.kinematics))
        if gpu:
            arm.kinematics._setup_gpu()
        try:
            for _ in range(14):  # 4 cm each: the fifth is beyond reach
                before = env.agent.robot.get_qpos()[0].clone()
                super(type(env.agent).__mro__[1], env.agent).set_action(torch.tensor([[0.04, 0, 0, 0, 0, 0, 1]]))
                if gpu:
                    env.agent.converge()
                before[:6], start = torch.clamp(arm._target_qpos[0], low, high), before[:6].clone()
                moves.append((before[:6] - start).abs().max().item())
                env.agent.robot.set_qpos(before[None])
        finally:
            vars(arm.kinematics).update(saved)
    cpu, gpu = moves[:14], moves[14:]
    np.testing.assert_allclose(gpu, cpu, atol=0.03)  # rad
    assert max(cpu[:4]) > 0.4 and max(gpu[4:]) < 0.1


def test_episode_is_fixed_by_its_id(four_envs):
    """Stops leakage of history, neighbours or worker count into an episode: bit-identical frames for 1 and 4 envs."""
    ids = np.array([763047, 27980, 115733, 660672])
    drive(four_envs, ids[::-1].copy(), 15)  # history that must not matter
    many, _, _ = drive(four_envs, ids, 25)
    one = make_envs(num_envs=1)
    try:
        for row in (2, 0):
            single, _, _ = drive(one, ids[row : row + 1], 25)
            np.testing.assert_array_equal(single[:, 0], many[:, row])
    finally:
        one.close()


def test_partial_reset_touches_only_its_rows(four_envs):
    """Stops a partial reset from restarting, or re-rendering differently, the other environments."""
    before, old = four_envs.reset(np.arange(4) * 1000)
    after, new = four_envs.reset(np.array([50000]), np.array([2]))
    np.testing.assert_array_equal(np.delete(after, 2, 0), np.delete(before, 2, 0))
    assert (after[2] != before[2]).any() and old[:2] + old[3:] == new[:2] + new[3:]


def test_only_bodies_in_play_are_simulated(env):
    """Stops idle bodies from costing physics and rendering: robot, table, object and plate, nothing else."""
    for episode_id in (0, 300000, 600000):
        env.reset(options={"episode_ids": [episode_id]})
        names = [entity.name for entity in env.scene.sub_scenes[0].entities]
        assert sum("object" in name for name in names) == 1 and sum("plate" in name for name in names) == 1


def test_gripper_opens_above_one_half():
    """Stops a policy's "closed" from opening the hand: published statistics have the gripper in [0, 1], 0 = closed."""
    actions = np.array([[0.0] * 6 + [value] for value in (1.0, 0.51, 0.5, 0.1, 0.0, -1.0)], np.float32)
    assert decode_gripper(actions)[:, 6].tolist() == [1, 1, -1, -1, -1, -1]


def test_vision_tasks_show_what_they_say(env):
    """Stops rows that measure robustness on pictures of the training setting: table photo, textures, noise."""
    table = env.pack.background
    try:
        for task, share in (("vision_image", None), ("vision_texture05", (0.01, 0.5)), ("vision_whole05", (0.9, 1.0))):
            env.set_task(task, "test")
            obs, _ = env.reset(options={"episode_ids": [12345]})
            picture, number = image(obs), int(env.episodes.table[0])
            if task == "vision_image":
                assert number >= 16 and (picture == table(number, 160, 120)).all(-1).mean() > 0.5, "not an unseen table"
                assert (picture == table(number % 16, 160, 120)).all(-1).mean() < 0.5, "the check sees nothing"
            else:
                env.mix *= 0
                plain = image(env._get_obs_with_sensor_data({}))
                low, high = share
                assert low < (picture != plain).any(-1).mean() <= high, task
    finally:
        env.set_task("main", "train")


def test_distractors_templates_and_arm_offsets(env):
    """Stops a task whose row is data only on paper: third body, instruction text and start pose in the simulator."""
    try:
        env.set_task("multi_carrot", "train")
        env.reset(options={"episode_ids": [123456]})
        state = env.privileged_state()
        np.testing.assert_allclose(state["third_pose"][0, :2], env.episodes.third_xyz[0, :2], atol=0.05)
        env.set_task("instruct", "test")
        env.reset(options={"episode_ids": [40000]})
        assert env.episodes.template[0] > 0 and env.instructions()[0] != f"put {env.pack.objects[0].name} on plate"
        env.set_task("ee_pose", "test")
        env.reset(options={"episode_ids": [987654321]})
        qpos = env.agent.robot.get_qpos()[0, :6].numpy()
        expected = (
            np.array([-0.01840777, 0.0398835, 0.22242722, -0.00460194, 1.36524296, 0.00153398])
            + env.episodes.arm_offset[0]
        )
        np.testing.assert_allclose(qpos, expected, atol=1e-5)
        assert np.abs(env.episodes.arm_offset[0]).max() > 0
    finally:
        env.set_task("main", "train")


@pytest.mark.parametrize("fidelity", ["fixed", "published"])
def test_object_moves_after_step_five(fidelity):
    """Stops a reposition that never happens, happens at another step, or (fixed) repeats on every evaluation."""
    env = make_env(task="position_change", split="test", fidelity=fidelity)
    env.reset(options={"episode_ids": [4242]})
    idle = np.array([[0, 0, 0, 0, 0, 0, 1.0]], np.float32)
    third = env.episodes.third_xyz[0]
    for step in range(1, 8):
        env.step(idle)
        near = np.linalg.norm(env._pose("object")[0, :2].numpy() - third[:2]) < 0.03
        assert near == (step >= 5), (step, near)
        if step == 5:
            height = env._pose("object")[0, 2].item() - env.object_rest_pose[0, 2].item()
            assert (height > 0.03) == (fidelity == "published")  # published: seen in mid-air
            env._teleport_object(env.object_rest_pose.clone(), keep_velocity=False)
            env.get_info()
            again = np.linalg.norm(env._pose("object")[0, :2].numpy() - third[:2]) < 0.03
            assert again == (fidelity == "published")  # its evaluate() has the side effect
            pose = env.object_rest_pose.clone()
            pose[:, :2] = torch.as_tensor(third[:2], dtype=torch.float32)
            env._teleport_object(pose, keep_velocity=False)
    env.close()


def test_batched_selection_of_bodies():
    """Stops the batched (GPU) path from mixing up environments: 64 environments pick among 25 bodies."""
    rng = np.random.default_rng(0)
    env = object.__new__(PutOnReceptacleEnv)
    values = torch.randn(25, 64, 7)
    env._in_play = {("object", k): values[k] for k in range(25)}
    env.num_envs, env.device, env.third_kind = 64, torch.device("cpu"), None
    env.episodes = type("E", (), {"object": rng.integers(0, 25, 64)})()
    env.scene = type("S", (), {"gpu_sim_enabled": True})()
    picked = env._for_selected("object", lambda value: value)
    expected = torch.stack([values[env.episodes.object[i], i] for i in range(64)])
    torch.testing.assert_close(picked, expected, rtol=0, atol=0)


@pytest.mark.parametrize(
    "kwargs, words",
    [
        (dict(num_envs=0), "num_envs = 0"),
        (dict(task="pour"), "pour"),
        (dict(assets="lego"), "lego"),
        (dict(image_size=(161, 121)), "161x121"),
        (dict(sim_freq=251), "251"),
        (dict(fidelity="rough"), "rough"),
        (dict(max_episode_steps=0), "max_episode_steps = 0"),
    ],
)
def test_bad_input_fails_at_once(kwargs, words):
    """Stops a wrong flag from surfacing minutes later inside a worker."""
    start = time.time()
    with pytest.raises((ValueError, FileNotFoundError), match=words):
        make_envs(**({"num_envs": 1} | kwargs))
    assert time.time() - start < 5


def test_missing_asset_directory_is_named(monkeypatch, tmp_path):
    """Stops an interactive download prompt or a late failure when the bridge assets are missing."""
    monkeypatch.setenv("MS_ASSET_DIR", str(tmp_path / "nowhere"))
    with pytest.raises(FileNotFoundError, match="nowhere"):
        make_envs(num_envs=1, assets="bridge")


def test_dead_worker_is_an_error_not_a_hang():
    """Stops a training run that waits for ever for a killed simulator, and says which worker it was."""
    envs = make_envs(num_envs=2, num_workers=1)
    try:
        envs.reset(np.array([0, 1]))
        process, pipe, _ = envs._workers[0]
        os.kill(process.pid, signal.SIGSTOP)
        with pytest.raises(RuntimeError, match="environment worker 0 .* did not answer within 0.5 s; its process"):
            envs._gather(0.5)
        os.kill(process.pid, signal.SIGCONT)
        os.kill(envs._workers[0][0].pid, signal.SIGKILL)
        with pytest.raises(RuntimeError, match="worker 0 .*signal 9"):
            envs.step(np.zeros((2, 7), np.float32))
    finally:
        envs.close()


def test_wrong_shapes_are_refused(four_envs):
    """Stops silent broadcasting of actions or ids over environments."""
    with pytest.raises(ValueError, match=r"\(4, 7\)"):
        four_envs.step(np.zeros((1, 7), np.float32))
    with pytest.raises(ValueError, match="same shape"):
        four_envs.reset(np.array([1, 2]))


@pytest.mark.gpu
def test_gpu_simulation_is_the_same_benchmark():
    """Stops one batched GPU simulation from being another benchmark: rest poses, pictures, the expert's success."""
    ids, finals = np.arange(8) * 90001, {}
    for device in ("cpu", "cuda"):
        envs, expert = make_envs(num_envs=8, max_episode_steps=50, device=device), Expert(8)
        try:
            images, instructions = envs.reset(ids)
            first = envs.privileged_state()
            with pytest.raises(ValueError, match="env_ids") if device == "cuda" else contextlib.nullcontext():
                envs.reset(ids[:1], np.array([0]))
            envs.reset(ids)
            expert.reset()
            dones = np.zeros(8, bool)
            while not dones.all():  # the last steps idle: success must last while the object is at rest
                _, _, dones, infos = envs.step(expert.act(envs.privileged_state()))
            finals[device] = images, instructions, first, infos["success"].sum()
        finally:
            envs.close()
    (images, texts, first, success), (gpu_images, gpu_texts, gpu_first, gpu_success) = finals.values()
    assert texts == gpu_texts and gpu_images.shape == images.shape and gpu_images.dtype == np.uint8
    assert np.abs(images.astype(float) - gpu_images).mean() < 5  # of 255; two renderers
    for key in ("plate_pose", "tcp_pose"):
        np.testing.assert_allclose(gpu_first[key][:, :3], first[key][:, :3], atol=0.003)
    assert np.median(np.linalg.norm(gpu_first["object_pose"] - first["object_pose"], axis=1)) < 0.02  # some roll
    assert success >= 7 and gpu_success >= success - 1
