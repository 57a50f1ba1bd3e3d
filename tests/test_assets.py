"""The two asset packs: counts, exact bounds, robots, bodies that stay put, pictures."""

import os
import re
import shlex
import shutil
import xml.etree.ElementTree as ElementTree

import numpy as np
import pytest
import sapien
from PIL import Image
from sapien import physx
from test_checkpoints import refused

from common.simulation.assets import FOLDER, load_pack
from common.simulation.env import make_env
from scripts import draw_tables

BRIDGE = pytest.param("bridge", marks=pytest.mark.bridge)
packs = pytest.mark.parametrize("name", ["primitive", BRIDGE])


def build(scene, pack, kind, index, pose):
    builder = scene.create_actor_builder()
    pack.add_body(builder, kind, index)
    builder.initial_pose = pose
    return builder.build(name=f"{kind}_{index}")


def rigid(entity):
    return entity.find_component_by_type(physx.PhysxRigidDynamicComponent)


@packs
def test_counts_names_and_pictures(name):
    """Stops a lost row, which ids count by position, swapped sides, writes into cached pictures."""
    pack = load_pack(name)
    assert (len(pack.objects), len(pack.plates)) == (25, 17)
    assert pack.mixes == [0.0] + [1.0] * 20
    assert os.path.exists(pack.robot_urdf)
    for group in (pack.objects, pack.plates):
        assert len({body.name for body in group}) == len(group)  # an instruction names one body
    assert pack.plates[0].name == "plate" and pack.objects[0].name == "carrot"
    for size in ((160, 120), (640, 480), (333, 250)):
        for picture in (pack.background(16, *size), pack.texture(3, *size)):
            assert picture.shape == (size[1], size[0], 3) and picture.dtype == np.uint8
            assert picture.std() > 5 and not picture.flags.writeable
    # Bounds, by which success and the grasp are judged, are those of the collision shapes
    scene = sapien.Scene()
    tolerance = 2e-6 if name == "primitive" else 5e-4  # PhysX thins out hulls: up to 0.48 mm
    for kind, group in (("object", pack.objects), ("plate", pack.plates)):
        for index, body in enumerate(group):
            component = rigid(build(scene, pack, kind, index, sapien.Pose([index, 0, 1])))
            bounds = np.array(component.compute_global_aabb_tight()) - [index, 0, 1]
            given = (body.bbox_min, body.bbox_max)
            np.testing.assert_allclose(bounds, given, atol=tolerance, err_msg=body.name)
            densities = [shape.density for shape in component.collision_shapes]
            assert densities == pytest.approx([body.density] * len(densities)), body.name
            surface = component.collision_shapes[0].physical_material
            friction = surface.static_friction, surface.dynamic_friction
            assert (*friction, surface.restitution) == (1, 1, 0)
            *sides, height = body.bbox_max - body.bbox_min
            if name == "primitive" and kind == "object":  # it can be picked
                assert min(sides) <= 0.045 and max(sides) <= 0.15, body.name
                assert 0.024 <= height <= 0.0421 and 0.02 <= component.mass <= 0.12, body.name
            elif name == "primitive":  # a receptacle is no wall, and is dropped as objects are
                assert height <= 0.0101 and 0.09 <= max(sides) <= 0.14, body.name
                np.testing.assert_allclose(body.bbox_max[2], height / 2)


@packs
def test_an_object_that_falls_is_an_error(name):
    """Stops a turned robot, and episodes about an object that lies below the table."""
    env = make_env(assets=name)
    env.reset(options={"episode_ids": [0]})
    tcp = env.agent.robot.links_map["ee_gripper_link"].pose
    down = tcp.to_transformation_matrix()[0, :3, 0].numpy()
    assert np.rad2deg(np.arccos(-down[2])) == pytest.approx(3.3, abs=0.1)
    env.arena._objs[0].set_pose(sapien.Pose([0, 0, -5]))  # as where no collision shape was read
    refused("object of .*fell", env.reset, options={"episode_ids": [0]})
    env.close()


def robot_numbers(path):
    """dict of what moves a URDF's robot: attributes of joints, and of masses and inertias."""
    numbers = {}
    for element in ElementTree.parse(path).getroot():
        parts = [element] if element.tag == "joint" else element.findall("inertial")
        for node in [node for part in parts for node in part.iter()]:
            for key, value in node.attrib.items():
                words = [float(w) if re.match(r"[-+.\d]", w) else w for w in value.split()]
                numbers[element.tag, element.get("name"), node.tag, key] = words
    return numbers


@pytest.mark.bridge
def test_what_is_as_published():
    """Stops an edited joint frame, limit, mass or inertia; a resize or alpha blend at 640x480."""
    folder = os.path.join(os.environ["MS_ASSET_DIR"], "data/rl4vla/more_table/imgs")
    for index, file in ((0, "001_table_simpler.png"), (16, "017_glass table_1.png")):
        pixels = np.asarray(Image.open(os.path.join(folder, file)))
        shown = load_pack("bridge").background(index, 640, 480)
        np.testing.assert_array_equal(shown, pixels[..., :3])
    ours, urdf = (load_pack(name).robot_urdf for name in ("primitive", "bridge"))
    assert len(robot_numbers(urdf)) > 150 and robot_numbers(ours) == robot_numbers(urdf)


def test_primitive_pictures_are_those_that_are_drawn(monkeypatch):
    """Stops pictures out of order or alike, an edited row that is not drawn, misspelt packs."""
    pack = load_pack("primitive")
    rows = draw_tables.json.loads((FOLDER / "primitive_pack.json").read_text())["tables"]
    assert len(rows) == 21
    for k in (0, 6, 7, 18):
        table, texture = draw_tables.draw_table(k, rows[k]), draw_tables.draw_texture(k)
        # drawn on another machine, libraries may round differently
        for drawn, shown in ((table, pack.background), (texture, pack.texture)):
            gap = draw_tables.small(drawn).astype(int) - shown(k, 160, 120)
            assert np.abs(gap).max() <= 1
    for show in (pack.background, pack.texture):
        pictures = [show(k, 64, 48).astype(int) for k in range(21)]
        for k, picture in enumerate(pictures):
            assert all(np.abs(picture - other).mean() > 10 for other in pictures[:k]), k
    monkeypatch.setenv("MS_ASSET_DIR", "/nowhere")
    refused("nowhere.*wx250s.urdf.*No such file.*fetch_assets.py --dir", load_pack, "bridge")
    refused("brigde", load_pack, "brigde")


SHOVEL, CARROT = "more_carrot/002_kitchen shovel_1/", "more_carrot/001_carrot_simpler/"
FINGER, POINTER = "../robots/widowx/meshes_wx250s/WXSA-250-M-10-Finger.", b"version https://git-lfs"
DAMAGE = [  # file, what the error says, new content or how many bytes are lost; 520: 20 lines
    (SHOVEL + "collision.obj", "No such", None), (SHOVEL + "collision.obj", "git-lfs", POINTER),
    (SHOVEL + "collision.obj", "no whole .obj", 520), (SHOVEL + "textured.glb", "no whole", 1),
    (CARROT + "textured.dae", "no element", 99), (CARROT + "Image_0.005.png", "No such", None),
    ("more_table/imgs/014_grass table_1.png", "", 99), ("more_plate/model_db.json", "", 9),
    (FINGER + "stl", "no whole .stl", 50), (FINGER + "mtl", "git-lfs", POINTER),
]  # fmt: skip


@pytest.mark.bridge
@pytest.mark.parametrize("file, named, damage", DAMAGE)
def test_damaged_files_are_refused(file, named, damage, tmp_path, monkeypatch):
    """Stops a scene with a body, a finger or a colour less, which SAPIEN tells nobody of."""
    root, path = tmp_path / "my assets", tmp_path / "my assets/data/rl4vla" / file
    shutil.copytree(os.environ["MS_ASSET_DIR"], root, copy_function=os.symlink)
    content = path.read_bytes()
    path.unlink()
    if damage is not None:
        path.write_bytes(damage if isinstance(damage, bytes) else content[:-damage])
    monkeypatch.setenv("MS_ASSET_DIR", str(root))
    command = re.escape(f"fetch_assets.py --dir {shlex.quote(str(root))}")
    refused(f"{re.escape(path.name)}.*{named}.*{command}", load_pack, "bridge")
