"""A picture shows the body upright, whatever the orientation of the arrays, and the grid where the map takes it."""

from pathlib import Path

import matplotlib.image
import nibabel as nib
import numpy as np
import pytest
from matplotlib.figure import Figure
from nibabel.orientations import apply_orientation, axcodes2ornt, inv_ornt_aff, ornt_transform
from scipy.ndimage import gaussian_filter

from voxelmorph_monai.pictures import save_registration_picture

SIZE = (20, 24, 16)  # right, front, up
AFFINE = np.diag([7.0, 6.0, 9.0, 1.0])
PLANES = [(1, 2), (0, 2), (0, 1)]  # axes of the body across and up: sagittal, coronal, axial


def head():
    """Grey ellipsoid; its middle is the middle of the grid."""
    x, y, z = ((grid - (n - 1) / 2) / (n / 2) for grid, n in zip(np.indices(SIZE), SIZE, strict=True))
    return 0.3 * (x**2 + y**2 + z**2 < 0.9)


def noise(seed):
    rng = np.random.default_rng(seed)
    parts = np.stack([gaussian_filter(rng.standard_normal(SIZE), 2) for _ in range(3)])
    return parts / parts.std()


def oriented(codes, images, ddf, determinant):
    """Restate what lies in RAS in an orientation such as LIA: arrays, vectors and affine."""
    change = ornt_transform(axcodes2ornt("RAS"), axcodes2ornt(codes))
    vectors = np.empty_like(ddf)
    for old, (new, sign) in enumerate(change):
        vectors[int(new)] = sign * ddf[old]
    field = np.stack([apply_orientation(component, change) for component in vectors])
    affine = AFFINE @ inv_ornt_aff(change, SIZE)
    assert "".join(nib.aff2axcodes(affine)) == codes
    return (
        *(apply_orientation(image, change) for image in images),
        field,
        apply_orientation(determinant, change),
        affine,
    )


@pytest.fixture
def draw(tmp_path, monkeypatch):
    """Save a picture, and give its panels by row and column besides the pixels of its file."""
    saved, save = [], Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda figure, *a, **k: saved.append(figure) or save(figure, *a, **k))

    def draw(images, ddf=None, determinant=None, codes="RAS"):
        ddf = np.zeros((3, *SIZE)) if ddf is None else ddf
        determinant = np.ones(SIZE) if determinant is None else determinant
        path = tmp_path / "report.png"
        save_registration_picture(path, *oriented(codes, images, ddf, determinant), title="what it is")
        assert [entry.name for entry in tmp_path.iterdir()] == ["report.png"]
        panels = np.array(saved[-1].axes[:21]).reshape(3, 7)[::-1]  # the axial slice is on top
        return panels, matplotlib.image.imread(path)[..., :3]

    return draw


def shown(panel):
    """Image of a panel, rows from below."""
    (image,) = panel.images
    assert image.origin == "lower"
    assert not panel.yaxis_inverted()
    assert not panel.xaxis_inverted()
    return np.asarray(image.get_array())


def test_one_body_gives_one_picture_whatever_its_arrays(draw):
    images, ddf, determinant = [head() * (1 + 0.1 * noise(n)[0]) for n in range(3)], noise(3), np.exp2(noise(4)[0])
    _, expected = draw(images, ddf, determinant)
    assert 300 < min(expected.shape[:2]) < max(expected.shape[:2]) < 3000
    assert len(np.unique(expected.reshape(-1, 3), axis=0)) > 500
    for codes in ("LIA", "PSR", "ASL"):
        _, found = draw(images, ddf, determinant, codes)
        # the ends of lines are placed in floating point: a pixel here and there may round the other way
        assert (np.abs(found - expected).max(axis=2) > 0.02).mean() < 1e-3
    _, mirrored = draw([image[::-1] for image in images], ddf, determinant)
    assert (np.abs(mirrored - expected).max(axis=2) > 0.02).mean() > 0.05


@pytest.mark.parametrize("codes", ["RAS", "LIA"])
def test_head_up_nose_up_left_on_the_left(draw, codes):
    rows = np.indices(SIZE)
    images = [head() * (1 + rows[axis] / SIZE[axis]) for axis in range(3)]  # brighter to the right, in front, above
    panels, _ = draw(images, codes=codes)
    for axis, (across, up) in enumerate(PLANES):
        seen = shown(panels[axis, axis]).T  # up goes along the rows; only along this axis no two slices are equal
        (place,) = [k for k in range(SIZE[axis]) if np.array_equal(seen, np.take(images[axis], k, axis))]
        assert 0.3 < place / (SIZE[axis] - 1) < (0.42 if axis == 0 else 0.6)  # through a hemisphere, not the fissure
        for column, image in enumerate(images):
            assert np.array_equal(shown(panels[axis, column]).T, np.take(image, place, axis))
        ratio = AFFINE[up, up] / AFFINE[across, across]
        assert panels[axis, 0].get_aspect() == pytest.approx(ratio)
        letters = {text.get_text(): text.get_position()[0] for text in panels[axis, 0].texts}
        left, right = "PA" if axis == 0 else "LR"
        assert letters.keys() == {left, right, "50 mm"}
        assert letters[left] < 0.5 < letters[right]
        (bar,) = panels[axis, 0].lines
        width = np.ptp(panels[axis, 0].get_xlim()) * AFFINE[across, across]
        assert np.ptp(bar.get_xdata()) * width == pytest.approx(50)
        frame = np.array([panels[axis, 0].get_xlim(), panels[axis, 0].get_ylim()])
        body = [np.ptp(np.flatnonzero(shown(panels[axis, 0]).any(axis=k))) + 1 for k in (0, 1)]
        assert (np.array(body) > 0.7 * np.ptp(frame, axis=1)).all()  # little is drawn around the body


def test_letters_and_scale_are_legible_in_a_body_that_fills_the_view(draw):
    """They lie within the image, on black, even where the body reaches its end."""
    panels, pixels = draw([np.ones(SIZE)] * 3)
    for row in panels:
        panel = row[0]
        low, high = panel.get_xlim(), panel.get_ylim()
        (image,) = panel.images
        assert (*low, *high) == pytest.approx(image.get_extent())  # nothing beyond the image is drawn
        place = panel.get_window_extent()
        for text in panel.texts[:2]:
            box = text.get_window_extent()
            assert place.x0 <= box.x0 <= box.x1 <= place.x1
            assert place.y0 <= box.y0 <= box.y1 <= place.y1
            scale = pixels.shape[0] / panel.figure.bbox.height  # the file has other dots per inch
            x = np.rint(scale * np.array([box.x0, box.x1])).astype(int)
            y = np.rint(pixels.shape[0] - scale * np.array([box.y1, box.y0])).astype(int)
            seen = pixels[y[0] : y[1], x[0] : x[1]].mean(axis=2)
            assert (seen < 0.1).mean() > 0.3  # the letter's own ground
            assert (seen > 0.9).mean() > 0.05


def test_differences_are_to_the_fixed_image(draw):
    moving, fixed, warped = head(), 2 * head(), 1.5 * head()
    panels, _ = draw([moving, fixed, warped])
    for row in panels:
        assert np.allclose(shown(row[3]), shown(row[0]) - shown(row[1]))
        assert np.allclose(shown(row[4]), shown(row[2]) - shown(row[1]))
        for panel in row[3:5]:
            low, high = panel.images[0].get_clim()
            assert low == -high < 0


def test_a_few_bright_voxels_do_not_darken_the_rest(draw):
    fixed = head()
    fixed[10, 12, 8] = 1
    panels, _ = draw([head(), fixed, head()])
    assert panels[0, 0].images[0].get_clim() == pytest.approx((0, 0.3))


@pytest.mark.parametrize("codes", ["RAS", "LIA"])
def test_grid_lies_where_the_map_takes_it(draw, codes):
    shift = np.array([1.25, -2.5, 3.0])  # to the right, to the back, up; in voxels
    panels, _ = draw([head()] * 3, np.broadcast_to(shift[:, None, None, None], (3, *SIZE)), codes=codes)
    for row, (across, up) in zip(panels, PLANES, strict=True):
        assert np.allclose(shown(row[5]), shown(row[0]) / 2)  # on the moving image
        points = np.concatenate([line.get_xydata() for line in row[5].lines])
        # each row and column of so small a grid is drawn, and a gap after it
        assert np.isnan(points[:, 1]).sum() == SIZE[across] + SIZE[up]
        assert np.nanmin(points, axis=0) == pytest.approx(shift[[across, up]])
        assert np.nanmax(points, axis=0) == pytest.approx(shift[[across, up]] + [SIZE[across] - 1, SIZE[up] - 1])
        assert row[5].get_xlim() == row[0].get_xlim()
        assert row[5].get_ylim() == row[0].get_ylim()


def test_folds_are_red_and_volumes_symmetric(draw):
    determinant = np.ones(SIZE)
    for index, value in enumerate([-0.5, 0.0, 0.01, 0.5, 2.0, 100.0], start=6):
        determinant[index] = value
    panels, pixels = draw([head()] * 3, determinant=determinant)
    image = panels[2, 6].images[0]
    colours = image.to_rgba(image.get_array())[0, 6:13, :3]  # from left to right
    assert np.array_equal(colours[:2], [[1, 0, 0]] * 2)
    assert not np.array_equal(colours[2], [1, 0, 0])
    assert colours[6] == pytest.approx([0.97] * 3, abs=0.02)  # white: the volume is kept
    assert np.log2(0.5) - image.get_clim()[0] == image.get_clim()[1] - np.log2(2)
    assert (colours[3, 0] > colours[3, 2]) and (colours[4, 2] > colours[4, 0])  # noqa: PT018, orange and violet
    red = np.abs(pixels - [1, 0, 0]).max(axis=2) < 0.02
    assert red[pixels.shape[0] // 3 :].mean() > 0.001


def test_nothing_is_left_of_a_picture_that_fails(tmp_path, monkeypatch):
    def fail(file, content):
        with file.open("wb") as half:
            half.write(content[:10])
        raise OSError("disk full")

    monkeypatch.setattr(Path, "write_bytes", fail)
    with pytest.raises(OSError, match="disk full"):
        save_registration_picture(tmp_path / "report.png", *[head()] * 3, np.zeros((3, *SIZE)), np.ones(SIZE), AFFINE)
    assert list(tmp_path.iterdir()) == []
