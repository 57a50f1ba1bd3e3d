"""The two asset packs: counts, exact bounds, the robot's numbers, bodies that stay put, pictures, errors."""

import os
import subprocess
import sys
import xml.etree.ElementTree as ElementTree

import numpy as np
import pytest
import sapien
import trimesh
from mani_skill.envs.sapien_env import BaseEnv
from mani_skill.envs.tasks.digital_twins.bridge_dataset_eval.base_env import WidowX250SBridgeDatasetFlatTable
from mani_skill.utils.structs.types import SimConfig
from sapien import physx

from common.simulation import assets
from common.simulation.assets import load_pack

needs_bridge = pytest.mark.bridge  # skipped with a reason where MS_ASSET_DIR is not set
packs = pytest.mark.parametrize("name", ["primitive", pytest.param("bridge", marks=needs_bridge)])
QPOS = [-0.01840777, 0.0398835, 0.22242722, -0.00460194, 1.36524296, 0.00153398, 0.037, 0.037]  # the nominal start


def collision_points(body) -> np.ndarray:
    """Corners of all collision shapes of a rigid body in the body's frame, (K, 3) m; a cylinder gives its rims."""
    points = []
    for shape in body.collision_shapes:
        if isinstance(shape, physx.PhysxCollisionShapeBox):
            local = np.array(np.meshgrid(*[(-h, h) for h in shape.half_size])).reshape(3, -1).T
        elif isinstance(shape, physx.PhysxCollisionShapeCylinder):
            angle = np.linspace(0, 2 * np.pi, 361)
            rim = np.stack([0 * angle, np.cos(angle) * shape.radius, np.sin(angle) * shape.radius], 1)
            local = np.concatenate([rim + [end * shape.half_length, 0, 0] for end in (-1, 1)])
        else:
            local = shape.vertices * shape.scale
        points.append(local @ shape.local_pose.to_transformation_matrix()[:3, :3].T + shape.local_pose.p)
    return np.concatenate(points)


def build(scene, pack, kind, index, pose):
    builder = scene.create_actor_builder()
    pack.add_body(builder, kind, index)
    builder.initial_pose = pose
    return builder.build(name=f"{kind}_{index}")


def rigid(entity):
    return entity.find_component_by_type(physx.PhysxRigidDynamicComponent)


def physics_scene():
    return sapien.Scene([physx.PhysxCpuSystem(), sapien.render.RenderSystem()])


@packs
def test_counts_and_names(name):
    """Stops a lost row: episode ids index 25 objects, 17 receptacles, 21 tables and textures by position."""
    pack = load_pack(name)
    assert (len(pack.objects), len(pack.plates), len(pack.tables), len(pack.mixes)) == (25, 17, 21, 21)
    assert pack.name == name and os.path.exists(pack.robot_urdf)
    for group in (pack.objects, pack.plates):
        assert len({body.name for body in group}) == len(group)  # an instruction must name one body
    assert pack.plates[0].name == "plate" and pack.objects[0].name == "carrot"
    assert pack.texture_mix(0) == 0.0 and [pack.texture_mix(i) for i in range(1, 21)] == [1.0] * 20
    assert load_pack(name) is pack


@packs
def test_bounds_are_those_of_the_collision_shapes(name):
    """Stops bounds that drift from the shapes: success tolerance, reset heights and the expert's grasp use them."""
    pack, scene = load_pack(name), physics_scene()
    tolerance = 2e-6 if name == "primitive" else 5e-4  # PhysX thins out hulls: up to 0.48 mm (plastic bottle)
    for kind, group in (("object", pack.objects), ("plate", pack.plates)):
        for index, body in enumerate(group):
            component = rigid(build(scene, pack, kind, index, sapien.Pose([index, 0, 1])))
            points = collision_points(component)
            np.testing.assert_allclose(points.min(0), body.bbox_min, atol=tolerance, err_msg=body.name)
            np.testing.assert_allclose(points.max(0), body.bbox_max, atol=tolerance, err_msg=body.name)
            assert all(s.density == pytest.approx(body.density) for s in component.collision_shapes), body.name
            material = component.collision_shapes[0].physical_material
            assert (material.static_friction, material.dynamic_friction, material.restitution) == (1, 1, 0)


def test_primitive_bodies_fit_the_gripper():
    """Stops an object too wide, too tall, too flat or too heavy to be picked, or a receptacle that is a wall."""
    pack, scene = load_pack("primitive"), physics_scene()
    for index, body in enumerate(pack.objects):
        size = body.bbox_max - body.bbox_min
        assert min(size[:2]) <= 0.045 and max(size[:2]) <= 0.15, body.name
        assert 0.024 <= size[2] <= 0.0421, body.name
        assert 0.02 <= rigid(build(scene, pack, "object", index, sapien.Pose())).mass <= 0.12, body.name
    for body in pack.plates:
        size = body.bbox_max - body.bbox_min
        assert size[2] <= 0.0101 and 0.09 <= max(size[:2]) <= 0.14, body.name
        np.testing.assert_allclose(body.bbox_max[2], size[2] / 2)  # dropped at the same height as the objects


def test_primitive_objects_stay_where_they_are_put():
    """Stops a rolling or toppling object: after the 1.3 s settle each lies within 5 mm of its place, upright."""
    pack, scene = load_pack("primitive"), physics_scene()
    scene.set_timestep(1 / 250)
    table = scene.create_actor_builder()
    pack.build_table(table)
    table.build_static(name="arena")
    placed = []
    for index, body in enumerate(pack.objects):
        for turn in range(4):
            yaw = turn * np.pi / 4
            start = sapien.Pose(
                [0.2 * (index % 10) - 0.9, 0.2 * (4 * (index // 10) + turn) - 1.1, 0.95],
                [np.cos(yaw / 2), 0, 0, np.sin(yaw / 2)],
            )
            placed.append((body, start, build(scene, pack, "object", index, start)))
    for _ in range(325):
        scene.step()
    for body, start, entity in placed:
        moved = start.inv() * entity.pose
        upright = moved.to_transformation_matrix()[2, 2]
        assert np.hypot(*moved.p[:2]) < 0.005, (body.name, moved.p)
        assert upright > 0.999, (body.name, upright)
        assert abs(entity.pose.p[2] + body.bbox_min[2] - 0.870) < 0.001, body.name
        assert np.linalg.norm(rigid(entity).linear_velocity) < 0.01, body.name


class RobotOnly(BaseEnv):
    """The upstream agent with a pack's robot file on a pack's table, and one object under the gripper."""

    def __init__(self, pack, **kwargs):
        self.pack = pack
        agent = type("WidowX", (WidowX250SBridgeDatasetFlatTable,), {"urdf_path": pack.robot_urdf})
        super().__init__(robot_uids=agent, **kwargs)

    @property
    def _default_sim_config(self):
        return SimConfig(sim_freq=250, control_freq=5)

    def _load_agent(self, options):
        super()._load_agent(options, sapien.Pose([0.147, 0.028, 0.870], [0, 0, 0, 1]))

    def _load_scene(self, options):
        builder = self.scene.create_actor_builder()
        self.pack.build_table(builder)
        builder.build_static(name="arena")
        builder = self.scene.create_actor_builder()
        load_pack("primitive").add_body(builder, "object", 14)  # the toy block, 38 mm
        builder.initial_pose = sapien.Pose([-0.1451, 0.0341, 0.8895])
        self.block = builder.build(name="block")

    def _initialize_episode(self, env_idx, options):
        self.agent.reset(np.array([QPOS], dtype=np.float32))
        self.agent.robot.set_pose(sapien.Pose([0.147, 0.028, 0.870], [0, 0, 0, 1]))
        self.block.set_pose(sapien.Pose([-0.1451, 0.0341, 0.8895]))

    def evaluate(self):
        return {}

    def _get_obs_extra(self, info):
        return {}


@packs
def test_robot_reaches_the_nominal_pose_and_grasps(name):
    """Stops a robot file that the upstream agent cannot use: wrong frames, controllers, limits, pads or signs."""
    env = RobotOnly(
        load_pack(name), obs_mode="none", reward_mode="none", sim_backend="physx_cpu", render_backend="none"
    )
    env.reset(seed=0)
    agent, tcp = env.agent, env.agent.robot.links_map["ee_gripper_link"]
    assert [joint.name for joint in agent.robot.active_joints][-2:] == ["left_finger", "right_finger"]
    np.testing.assert_allclose(tcp.pose.p[0].numpy(), [-0.1451, 0.0341, 1.0053], atol=1e-4)
    down = tcp.pose.to_transformation_matrix()[0, :3, 0].numpy()
    assert np.rad2deg(np.arccos(-down[2])) == pytest.approx(3.3, abs=0.1)
    for goal, gripper, steps in ((0.890, 1.0, 6), (0.890, -1.0, 3), (0.990, -1.0, 6)):
        for _ in range(steps):
            z = float(np.clip(goal - tcp.pose.p[0, 2].item(), -0.03, 0.03))
            env.step(np.array([0, 0, z, 0, 0, 0, gripper], dtype=np.float32))
        assert bool(agent.is_grasping(env.block)[0]) == (gripper < 0)
    assert env.block.pose.p[0, 2].item() > 0.95
    assert agent.robot.qpos[0, -2:].sum().item() == pytest.approx(0.0590, abs=0.001)  # 38 mm + twice the pads
    env.close()


def robot_numbers(path) -> dict:
    """Every number of a URDF that moves: joints with frames, axes and limits, and masses and inertias of the links."""
    numbers = {}
    for element in ElementTree.parse(path).getroot():
        parts = [element] if element.tag == "joint" else [e for e in element if e.tag == "inertial"]
        for part in parts:
            for node in part.iter():
                for key, value in node.attrib.items():
                    words = value.split()
                    isnumber = all(w.replace("e-", "").replace(".", "").replace("-", "").isdigit() for w in words)
                    numbers[element.tag, element.get("name"), node.tag, key] = (
                        [float(w) for w in words] if isnumber else value
                    )
    return numbers


@needs_bridge
def test_primitive_robot_moves_like_the_published_one():
    """Stops an edited joint frame, limit, mass or inertia: actions and their effect must be the same in both packs."""
    primitive, real = (robot_numbers(load_pack(name).robot_urdf) for name in ("primitive", "bridge"))
    assert len(real) > 150 and primitive == real


@needs_bridge
def test_primitive_fingers_have_the_published_pads():
    """Stops a finger whose pad or tip is elsewhere than the real one's (its convex hull, as in PhysX): other grasps."""
    mesh = trimesh.load(
        os.path.join(os.path.dirname(load_pack("bridge").robot_urdf), "meshes_wx250s/WXSA-250-M-10-Finger.stl")
    )
    turn = trimesh.transformations.euler_matrix(np.pi, np.pi, 0)[:3, :3]
    hull = trimesh.convex.convex_hull(mesh.vertices * 1e-3 @ turn.T + [0, 0.005, 0])
    link = ElementTree.parse(load_pack("primitive").robot_urdf).getroot().find("link[@name='left_finger_link']")
    box, origin = link.find("collision/geometry/box"), link.find("collision/origin")
    size, xyz, rpy = (np.array(v.split(), float) for v in (box.get("size"), origin.get("xyz"), origin.get("rpy")))
    turn = trimesh.transformations.euler_matrix(*rpy)[:3, :3]
    corners = np.array([[x, -1, z] for x in (-1, 1) for z in (-1, 1)]) / 2 * size @ turn.T + xyz  # the inner face
    facet = np.argmax(hull.facets_area * (hull.facets_normal[:, 1] < -0.99))
    pad = hull.vertices[np.unique(hull.faces[hull.facets[facet]])]
    distance = (corners - pad[0]) @ hull.facets_normal[facet]
    assert np.abs(distance).max() < 2e-4
    assert corners[:, 0].max() == pytest.approx(pad[:, 0].max(), abs=2e-4)  # the tip
    assert corners[:, 2].max() == pytest.approx(pad[:, 2].max(), abs=2e-4)  # the width


@packs
@pytest.mark.parametrize("size", [(160, 120), (640, 480), (333, 250)])
def test_pictures_have_any_size(name, size):
    """Stops swapped width and height, alpha channels and float pictures."""
    pack = load_pack(name)
    for picture in (pack.background(16, *size), pack.texture(3, *size)):
        assert picture.shape == (size[1], size[0], 3) and picture.dtype == np.uint8
        assert (
            picture.std() > 5 and not picture.flags.writeable
        )  # cached: a caller that writes would change all episodes


def test_drawn_pictures_are_deterministic_and_distinct():
    """Stops pictures that depend on the global generator, and test tables that look like training tables."""
    pack = load_pack("primitive")
    for draw in (pack.background, pack.texture):
        pictures = [draw(i, 64, 48).astype(int) for i in range(21)]
        for i, picture in enumerate(pictures):
            assert all(np.abs(picture - other).mean() > 10 for other in pictures[:i]), i
        assets._resized.cache_clear()
        np.random.seed(1)
        for i in (0, 4, 18):
            np.testing.assert_array_equal(draw(i, 64, 48), pictures[i])


@needs_bridge
def test_published_pictures_are_untouched_at_their_own_size():
    """Stops a resize or an alpha blend at 640x480, where results must equal the published ones bit for bit."""
    from PIL import Image

    pack, folder = load_pack("bridge"), os.path.join(os.environ["MS_ASSET_DIR"], "data/rl4vla/more_table/imgs")
    for index in (0, 16):
        pixels = np.asarray(Image.open(os.path.join(folder, pack.tables[index])))
        np.testing.assert_array_equal(pack.background(index, 640, 480), pixels[..., :3])


def test_errors_name_value_rule_and_fix(monkeypatch, tmp_path):
    """Stops a bare KeyError or a download prompt where a pack is misspelt or its files are missing."""
    with pytest.raises(ValueError, match="assets='brigde'.*'primitive'.*'bridge'"):
        load_pack("brigde")
    monkeypatch.setenv("MS_ASSET_DIR", str(tmp_path))
    with pytest.raises(FileNotFoundError) as error:
        load_pack("bridge")
    for words in (str(tmp_path / "data/robots/widowx/wx250s.urdf"), "MS_ASSET_DIR", "common.simulation.assets fetch --dir"):
        assert words in str(error.value)


def test_fetch_asks_for_a_folder():
    """Stops a download into the current folder by accident, and a broken command line."""
    run = [sys.executable, "-m", "common.simulation.assets"]
    for arguments, code, words in ((["fetch"], 2, "--dir"), (["fetch", "--help"], 0, "MS_ASSET_DIR"), ([], 2, "fetch")):
        result = subprocess.run([*run, *arguments], capture_output=True, text=True)
        assert result.returncode == code and words in result.stdout + result.stderr
