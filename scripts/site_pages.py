"""What `make docs` shows beside docs/: a hook of MkDocs, named in mkdocs.yml.

The site has the repository's own paths, so that a link that works there works here. A folder of
results without a README gets a page that lists its files, a script a page with its code.
results/browse.md is made from the files in results/.
"""

import json
import re
from pathlib import Path

from mkdocs.structure.files import File, Files
from tabulate import tabulate

from common.run.evaluate import wilson
from scripts.report import outcomes

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "results"
FILES = ("LICENSE", "CITATION.cff", "Dockerfile")
SHOWN = (*FILES, "*.md", "benchmarks/*.md", "docs/**/*", "results/**/*")
WIDE = "---\nhide: [toc]\n---\n\n"  # a page without its table of contents
ABOUT = """# Browse the results

Made from the files in `results/` when the site is built. A click on a heading sorts a table.
[How to read them](README.md) says what the columns mean and what makes runs unequal.
"""
EPISODES = """## Episodes

![an episode before and after PPO](../docs/images/strip.jpg)

The first picture of one episode of each of the 16 tasks:

![first pictures of the 16 tasks](../docs/images/benchmark/primitive.jpg)"""


def on_files(files, config):
    """The repository's files in place of those of docs/; those of the theme stay."""
    paths = {path for glob in SHOWN for path in ROOT.glob(glob)}
    kept = [file for file in files if file.src_dir != config.docs_dir]
    for path in sorted(paths):
        name = path.relative_to(ROOT).as_posix()
        if path.is_file():
            kept.append(File(name, str(ROOT), config.site_dir, use_directory_urls=True))
        elif "results/" in name and not (path / "README.md").exists():
            kept.append(File.generated(config, f"{name}/README.md", content=listing(path)))
    for path in ROOT.glob("*.py"):
        code = f"# {path.name}\n\n```python\n{path.read_text(encoding='utf-8')}```\n"
        kept.append(File.generated(config, f"{path.name}.md", content=WIDE + code))
    kept.append(File.generated(config, "results/browse.md", content=WIDE + browse()))
    return Files(kept)


def on_page_markdown(markdown, page, config, files):
    """Links to a folder or a script lead to its page."""
    folder = (ROOT / page.file.src_uri).parent

    def lead(link):
        target = folder / link[1]
        if target.is_dir():
            return f"]({link[1]}/README.md)"
        return f"]({link[1]}.md)" if target.suffix == ".py" else link[0]

    return re.sub(r"\]\(([^):#]+)\)", lead, markdown)


def listing(folder):
    """Page of a folder without a README."""
    names = sorted(path.name for path in folder.iterdir())
    links = "\n".join(f"- [{name}]({name})" for name in names)
    return f"# {folder.relative_to(ROOT)}\n\n{links}\n"


def browse():
    """results/browse.md: tables of all evaluations and runs, figures, videos."""
    judged, tasks, runs = [], {}, []
    for path in sorted(RESULTS.rglob("results.json")):
        folder = path.parent.relative_to(RESULTS).as_posix()
        for policy, entry in json.loads(path.read_text(encoding="utf-8"))["policies"].items():
            head = {"evaluation": f"[{folder}]({folder}/README.md)", "policy": policy}
            rows = entry["rows"].values()
            judged += [head | judge(row) for row in rows if row["dimension"] == "id"]
            for task, success in outcomes(entry["rows"]).items():
                if len(entry["rows"]) > 1:
                    line = tasks.setdefault(task, {"task": task})
                    line[f"{folder}: {policy}"] = f"{success.mean():.3f}"
    logs = [path for path in RESULTS.rglob("*.jsonl") if path.name != "machines.jsonl"]
    for path in sorted(logs):
        name = path.relative_to(RESULTS).as_posix()
        lines = path.read_text(encoding="utf-8").splitlines()
        runs.append({"log": f"[{name}]({name})", **progress([json.loads(line) for line in lines])})

    parts = [ABOUT, "## Held-out episodes of the training task", table(judged)]
    parts += ["## All 16 tasks", "Share of success.", table(tasks.values())]
    parts += ["## Training", "Success is on each run's own held-out episodes.", table(runs)]
    parts.append("## Figures")
    for path in sorted(RESULTS.rglob("figure.png")):
        folder = path.parent.relative_to(RESULTS).as_posix()
        parts.append(f"[{folder}]({folder}/README.md)\n\n![{folder}]({folder}/figure.png)")
    parts.append(EPISODES)
    for path in sorted(RESULTS.rglob("*.mp4")):
        name = path.relative_to(RESULTS).as_posix()
        parts.append(f'{name}\n\n<video controls preload=none src="../{name}"></video>')
    return "\n\n".join(parts) + "\n"


def judge(row):
    """Columns of one row of a results.json."""
    low, high = wilson(row["k"], row["n"])
    interval = f"[{low:.2f}, {high:.2f}]"
    columns = {"solved": row["k"], "of": row["n"], "success": f"{row['k'] / row['n']:.2f}"}
    columns |= {"95 % interval": interval, "once": f"{row['success_once']:.2f}"}
    return columns | {"commit": row["commit"]}


def progress(rows):
    """Columns of one run's log."""
    own = [v for row in rows for k, v in row.items() if re.fullmatch("eval/.*success_at_end", k)]
    own = [f"{value:.2f}" for value in own if value is not None] or [""]
    steps = f"{rows[-1]['step']:,}"
    return {"steps or updates": steps, "first success": own[0], "last": own[-1], "best": max(own)}


def table(rows):
    return tabulate(rows, "keys", "github", disable_numparse=True)
