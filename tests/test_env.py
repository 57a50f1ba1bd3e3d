"""The environment in the real simulator: geometry, success and reward by real contacts."""

import copy
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from common.simulation.env import CAMERA, SCENES, PutOnReceptacleEnv, make_env
from demonstrations.expert import Expert

IDLE = np.array([[0, 0, 0, 0, 0, 0, 1.0]], np.float32)
BRIDGE = pytest.param("bridge", marks=pytest.mark.bridge)


@pytest.fixture(scope="module")
def env():
    """One environment of the small scene in this process, of task main."""
    env = make_env(**SCENES["small"])
    yield env
    env.close()


def move(env, *metres):
    """Put the object x, y, z metres from where it is, at rest."""
    pose = env._pose("object").copy()
    pose[:, :3] += metres
    env._teleport_object(pose, keep_velocity=False)


@pytest.mark.parametrize("assets", ["primitive", BRIDGE])
def test_nominal_pose_and_camera(assets):
    """Stops a wrong base pose, joint order, camera mount or intrinsics; published, at 640x480."""
    env = make_env(assets=assets)
    env.reset(options={"episode_ids": [0]})
    tcp = env.privileged_state()["tcp_pose"][0, :3]
    np.testing.assert_allclose(tcp, (-0.1451, 0.0341, 1.0053), atol=2e-4)
    camera = env.scene.sensors[CAMERA].camera
    scaled = camera.get_intrinsic_matrix()[0].numpy() * [[6.0], [6.0], [1.0]]
    scaled[:2, 2] += env.view[:2]
    points = [[x, y, 0.87, 1.0] for x in (-0.235, -0.085) for y in (-0.075, 0.075)]
    points = np.array([[-0.185, 0.005, 0.87, 1.0], *points])
    rays = points @ camera.get_extrinsic_matrix()[0].numpy().T @ scaled.T
    middle, *corners = rays[:, :2] / rays[:, 2:]
    np.testing.assert_allclose(middle, (319.501, 239.545), atol=2.0)
    np.testing.assert_allclose(np.min(corners, axis=0), (169, 179), atol=1.5)
    np.testing.assert_allclose(np.max(corners, axis=0), (421, 360), atol=1.5)
    env.close()


def test_what_pays(env):
    """Stops success without real contacts, other pay than 0.1 + 0.1 + 1, pay without a grasp."""
    expert = Expert(1)
    env.reset(options={"episode_ids": [0]})
    steps = [env.step(expert.act(env.privileged_state())) for _ in range(36)]
    assert sum(step[1].item() for step in steps) == pytest.approx(1.2)
    assert steps[-1][4]["success"].item() and steps[-1][4]["held"].item()
    features = env.state_features()
    assert features[0, 31:35].tolist() == [1, 1, 1, np.float32(36 / 40)]
    move(env, -0.15, 0, 0)
    _, reward, _, _, info = env.step(IDLE)
    assert not info["success"].item() and info["success_once"].item()
    assert reward.item() == pytest.approx(-1.0)
    assert env.state_features()[0, 31:34].tolist() == [1, 1, 0]
    env.reset(options={"episode_ids": [777]})
    assert [env.step(IDLE)[1].item() for _ in range(5)] == [0.0] * 5
    x, y = (env._pose("plate") - env._pose("object"))[0, :2].tolist()
    move(env, x, y, 0.02)
    steps = [env.step(IDLE) for _ in range(8)]
    assert steps[-1][4]["success"].item() and not steps[-1][4]["grasped"].item()
    assert sum(step[1].item() for step in steps) == 0


def judge(env, x=0.0, z=0.02, touch=0.0, grip=(0.0, 0.0, 0.0)):
    """`evaluate`, x and z metres from plate (half 5.5 cm) to object (1.7 cm), newtons of touch, and
    grip: newtons of a finger's push, its degrees to the closing direction, newtons of the other."""

    def force(one, other):
        if other == "plate":
            return torch.tensor([[0.0, 0.0, touch]])
        newtons, angle = grip[0 if one.sign > 0 else -1], np.deg2rad(grip[1])
        return torch.tensor([[newtons * np.sin(angle), newtons * np.cos(angle) * one.sign, 0.0]])

    env.num_envs, env.device, env.fidelity = 1, torch.device("cpu"), "fixed"
    env.half = {"plate": np.array([[0.055, 0.055, 0.003]]), "object": np.full((1, 3), 0.017)}
    links = [SimpleNamespace(sign=sign) for sign in (1.0, -1.0)]
    env.agent = SimpleNamespace(finger1_link=links[0], finger2_link=links[1])
    env.scene = SimpleNamespace(get_pairwise_contact_forces=force)
    env._for_selected = lambda which, function: function(which)
    env._pose = lambda which: np.array([[x, 0.0, z] if which == "object" else [0.0] * 3])
    env._pose_of = lambda link: np.eye(7)[3:4]
    return {key: value.item() for key, value in env.evaluate().items()}


def new_episode():
    env = object.__new__(PutOnReceptacleEnv)
    env._grasp_count = np.zeros(1, int)
    env._ever = {key: np.zeros(1, bool) for key in ("grasped", "held", "success")}
    return env


def test_thresholds_of_success_and_grasp():
    """Stops a looser measure, which every policy would enjoy: inside and outside each limit."""
    # The plate's half extent + 1 cm; 5 cm between the bodies; above the plate
    inside = [(0.064, 0.02, 0.04), (0, 0.069, 0.04), (0, 0.02, 0.031)]
    outside = [(0.066, 0.02, 0.04), (0, 0.071, 0.04), (0, -0.001, 0.04), (0, 0.02, 0.029)]
    placed = [judge(new_episode(), *case)["success"] for case in inside + outside]
    assert placed == [True] * 3 + [False] * 4
    # Both fingers push with .5 N or more, within 85 degrees of their closing direction
    inside, outside = [(1, 84, 1), (0.51, 0, 0.51)], [(1, 86, 1), (0.49, 0, 1), (1, 0, 0.49)]
    grasped = [judge(new_episode(), grip=grip)["grasped"] for grip in inside + outside]
    assert grasped == [True] * 2 + [False] * 3
    held, broken = new_episode(), new_episode()
    assert [judge(held, grip=(1, 0, 1))["held"] for _ in range(5)] == [False] * 4 + [True]
    assert not any(judge(broken, grip=(k != 3, 0, 1))["held"] for k in range(8)), "in a row"


def test_controllers(env, monkeypatch):
    """Stops a numpy controller unlike ManiSkill's, a GPU's solver that misses or sweeps."""
    first = [0.02, -0.01, -0.03, 0.02, -0.03, 0.2, 1.0]
    maniskills = super(type(env.agent).__mro__[1], env.agent).set_action
    targets = []
    for set_action in (env.agent.set_action, maniskills):
        env.reset(options={"episode_ids": [9]})
        for action in (first, [0.0, 0.02, -0.02, 0.0, 0.05, -0.3, -1.0]):
            set_action(torch.tensor([action]))
            for _ in range(env._sim_steps_per_control):
                env.scene.step()
        joints = env.agent.robot.active_joints
        targets.append([float(joint._objs[0].drive_target[0]) for joint in joints])
    np.testing.assert_allclose(targets[0], targets[1], atol=1e-4)
    with pytest.raises(ValueError, match="not finite"):
        env.step(np.full((1, 7), np.nan))
    arm = env.agent.controller.controllers["arm"]
    monkeypatch.setattr(arm, "kinematics", copy.copy(arm.kinematics))
    targets = []
    for converge in (list, list, env.agent.converge):  # list: nothing is done
        env.reset(options={"episode_ids": [9]})
        maniskills(torch.tensor([first]) * 1.3)
        converge()
        targets.append(arm._target_qpos[0].numpy().copy())
        arm.kinematics._setup_gpu()  # the GPU's solver, which runs on any device
    cpu, once, twice = targets
    assert np.abs(once - cpu).max() > 2e-3  # rad
    np.testing.assert_allclose(twice, cpu, atol=5e-4)
    low, high = env.agent.robot.get_qlimits()[0, :6].T
    env.reset(options={"episode_ids": [9]})
    moves = []
    for _ in range(14):  # 4 cm each: the fifth is beyond reach
        qpos = env.agent.robot.get_qpos()[0].clone()
        maniskills(torch.tensor([[0.04, 0, 0, 0, 0, 0, 1]]))
        env.agent.converge()
        target = torch.clamp(arm._target_qpos[0], low, high)
        moves.append((target - qpos[:6]).abs().max().item())
        qpos[:6] = target
        env.agent.robot.set_qpos(qpos[None])
    assert max(moves[:4]) > 0.4 and max(moves[4:]) < 0.1


def test_tasks_are_what_they_say(env):
    """Stops pictures, bodies, words and poses on paper only, and idle bodies that cost physics."""

    def task(name, split, episode_id):
        env.set_task(name, split)
        return env.reset(options={"episode_ids": [episode_id]})[0]["sensor_data"][CAMERA]["rgb"][0]

    for episode_id in (0, 300000, 600000, 0):
        task("main", "train", episode_id)
        names = " ".join(entity.name for entity in env.scene.sub_scenes[0].entities)
        assert (names.count("object"), names.count("plate")) == (1, 1)
    picture = task("vision_image", "test", 12345).numpy()
    number = int(env.episodes.table[0])
    tables = [env.pack.background(table, 80, 60, env.view) for table in (number, number % 16)]
    shares = [(picture == table).all(-1).mean() for table in tables]
    assert number >= 16 and shares[0] > 0.5 > shares[1]
    for name, low, high in (("vision_texture05", 0.01, 0.5), ("vision_whole05", 0.9, 1.0)):
        picture = task(name, "test", 12345)
        env.mix *= 0
        plain = env._get_obs_with_sensor_data({})["sensor_data"][CAMERA]["rgb"][0]
        assert low < (picture != plain).any(-1).float().mean() <= high, name
    task("multi_carrot", "train", 123456)
    third = env._in_play["object", int(env.episodes.third_index[0])].pose.p[0, :2].numpy()
    np.testing.assert_allclose(third, env.episodes.third_xyz[0, :2], atol=0.05)
    task("instruct", "test", 40000)
    assert env.instructions()[0] != f"put {env.pack.objects[0].name} on plate"
    task("ee_pose", "test", 987654321)
    start = [-0.01840777, 0.0398835, 0.22242722, -0.00460194, 1.36524296, 0.00153398]
    offset = env.agent.robot.get_qpos()[0, :6].numpy() - start
    np.testing.assert_allclose(offset, env.episodes.arm_offset[0], atol=1e-5)
    assert np.abs(offset).max() > 1e-4
    env.set_task("main", "train")


@pytest.mark.parametrize("fidelity", ["fixed", "published"])
def test_object_moves_after_step_five(fidelity):
    """Stops a reposition that never happens, happens at another step, or (fixed) twice."""
    env = make_env(task="position_change", split="test", fidelity=fidelity)
    env.reset(options={"episode_ids": [4242]})

    def at_third():
        offset = env._pose("object")[0, :2] - env.episodes.third_xyz[0, :2]
        return np.linalg.norm(offset) < 0.03

    for step in range(1, 6):
        env.step(IDLE)
        assert at_third() == (step == 5)
    height = env._pose("object")[0, 2] - env.object_rest_pose[0, 2]
    assert (height > 0.03) == (fidelity == "published")  # published: seen in mid-air
    env._teleport_object(env.object_rest_pose, keep_velocity=False)
    env.get_info()
    assert at_third() == (fidelity == "published")  # its evaluate() has the side effect
    env.step(IDLE)
    assert at_third() == (fidelity == "published")
    env.close()


def test_batched_selection_of_bodies():
    """Stops the batched (GPU) path from mixing up environments: 64 of them, 25 bodies."""
    rng = np.random.default_rng(0)
    indices, values = rng.integers(0, 25, 64), rng.normal(size=(25, 64, 7))
    env = object.__new__(PutOnReceptacleEnv)
    env._in_play = {("object", k): values[k] for k in range(25)}
    env.num_envs, env.device = 64, torch.device("cpu")
    env.episodes = SimpleNamespace(object=indices)
    env.scene = SimpleNamespace(gpu_sim_enabled=True)
    picked = env._for_selected("object", lambda value: value)
    assert all(np.array_equal(picked[i], values[indices[i], i]) for i in range(64))


@pytest.mark.gpu
def test_gpu_simulation_is_the_same_benchmark():
    """Stops one batched simulation from being another benchmark: poses, pictures, success."""
    ids, found = np.arange(8) * 90001, []
    for batches, backends in ((ids[:, None], (1,)), (ids[None], (8, "physx_cuda", "gpu"))):
        env, parts = make_env(*backends), []
        for batch in batches:
            obs, _ = env.reset(options={"episode_ids": batch})
            expert, start = Expert(len(batch)), env.privileged_state()
            for _ in range(50):
                info = env.step(expert.act(env.privileged_state()))[4]
            pictures = obs["sensor_data"][CAMERA]["rgb"].cpu().float()
            parts.append((pictures, start["plate_pose"], start["tcp_pose"], info["success"].cpu()))
        found.append([np.concatenate(part) for part in zip(*parts, strict=True)])
        env.close()
    pictures, plates, tcps, success = zip(*found, strict=True)
    assert np.abs(pictures[0] - pictures[1]).mean() < 5  # of 255
    for cpu, gpu in (plates, tcps):
        np.testing.assert_allclose(gpu[:, :3], cpu[:, :3], atol=0.003)
    assert success[0].sum() >= 7 and success[1].sum() >= success[0].sum() - 1
