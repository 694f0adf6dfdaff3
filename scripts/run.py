"""Makes one run by papermill and shows what it says meanwhile: python scripts/run.py MODEL FOLDER."""
import sys
from pathlib import Path

from papermill import PapermillExecutionError, execute_notebook

model, folder = sys.argv[1:]
page = Path(folder) / f"03_train.{model.replace('/', '_')}.ipynb"
page.parent.mkdir(parents=True, exist_ok=True)
try:
    execute_notebook("nbs/03_train.ipynb", page, dict(model=model, out_dir=folder), progress_bar=False,
                     stdout_file=sys.stdout, extra_arguments=["--IPKernelApp.log_level=CRITICAL"])
except PapermillExecutionError as e: sys.exit(f"{e.ename}: {e.evalue}\nThe page so far: {page}")
print(f"\n{page}  the page: tables, pictures, files")
