# Everything runs in environments of its own, made from the tested versions.
PYTHON ?= python3
NEWEST := .venv
OLDEST := .venv-oldest

.PHONY: demo app environments test test-newest test-oldest test-long test-plain-processor test-processors test-faults lint format docs docs-serve docs-blocks notebooks bench bench-app dist test-wheel clean

# Trains on drawn birds, offline, and shows what the trait maps are worth: docs/demo.md.
demo: $(NEWEST)/installed
	$(NEWEST)/bin/prompt-cam demo

# Asks the demonstration's model about its birds, in the browser: docs/app.md.
app: demo
	$(NEWEST)/bin/prompt-cam app prompt_cam_demo/model --examples prompt_cam_demo/birds

# Both environments: `make -j2 environments` makes them side by side.
environments: $(NEWEST)/installed $(OLDEST)/installed

test: test-newest test-oldest

test-newest: $(NEWEST)/installed
	$(NEWEST)/bin/python -m pytest -n 3 -m "not (faults and slow) and not long"

# What takes longest, and further cases of what `make test` tries once: before a release, and after a change of what it
# is about.
test-long: $(NEWEST)/installed
	$(NEWEST)/bin/python -m pytest -n 2 -m long

# The oldest supported transformers runs the fast part of what uses it: models and their files, image processors,
# Trainer, pipeline, Hub.
USING_TRANSFORMERS := backbone_formats baselines_models baselines_training checkpoint citizen door hub_loading images intr \
	layers_as_modules modeling parity pipeline prepared prompt_sets resume train
test-oldest: $(OLDEST)/installed
	$(OLDEST)/bin/python -m pytest -n 2 -m "not slow" $(USING_TRANSFORMERS:%=tests/test_%.py)

# What computes a model's numbers, once more as other processors do: weights at odd places, other kernels. The plainest
# kernels differ most from those of a new processor; test-processors tries more.
COMPUTING := checkpoint prompt_sets modeling pipeline parity maps ranking baselines_models baselines_maps sanity
OTHER_PROCESSOR := $(NEWEST)/bin/python -m pytest -n 2 -m "not slow" $(COMPUTING:%=tests/test_%.py)
test-plain-processor: $(NEWEST)/installed
	ATEN_CPU_CAPABILITY=default ONEDNN_MAX_CPU_ISA=SSE41 $(OTHER_PROCESSOR) --misalign 4

test-processors: $(NEWEST)/installed test-plain-processor
	ONEDNN_MAX_CPU_ISA=AVX2 $(OTHER_PROCESSOR) --misalign 8
	ATEN_CPU_CAPABILITY=avx2 $(OTHER_PROCESSOR) --misalign 16

# The whole campaign of faults, and a table of what it found.
test-faults: $(NEWEST)/installed
	$(NEWEST)/bin/python -m pytest -n 2 --dist loadfile tests/faults

lint: $(NEWEST)/installed
	$(NEWEST)/bin/ruff check .
	$(NEWEST)/bin/ruff format --check .
	$(NEWEST)/bin/mypy

format: $(NEWEST)/installed
	$(NEWEST)/bin/ruff check --fix .
	$(NEWEST)/bin/ruff format .

# The site, into build/site: a broken link or anchor fails, and so does a public name that the reference lacks.
docs docs-serve: export NO_MKDOCS_2_WARNING := 1
docs: $(NEWEST)/installed
	$(NEWEST)/bin/mkdocs build

docs-serve: $(NEWEST)/installed
	$(NEWEST)/bin/mkdocs serve

# Which code blocks of the documentation run, which are checked only, and why.
docs-blocks: $(NEWEST)/installed
	$(NEWEST)/bin/python tests/docs_blocks.py

# Runs the notebooks again, in place: docs/notebooks/README.md.
notebooks: $(NEWEST)/installed
	$(NEWEST)/bin/python docs/notebooks/execute.py

bench: $(NEWEST)/installed
	$(NEWEST)/bin/python benchmarks/bench_model.py
	$(NEWEST)/bin/python benchmarks/bench_ranking.py
	$(NEWEST)/bin/python benchmarks/bench_faithfulness.py
	$(NEWEST)/bin/python benchmarks/bench_loader.py
	$(NEWEST)/bin/python benchmarks/bench_gpu.py

bench-app: demo
	$(NEWEST)/bin/python benchmarks/bench_app.py prompt_cam_demo/model --examples prompt_cam_demo/birds

# What is uploaded to PyPI, checked as PyPI checks it.
dist:
	rm -rf dist build/release
	$(PYTHON) -m venv build/release
	build/release/bin/python -m pip install --quiet -c constraints.txt build twine
	build/release/bin/python -m build
	build/release/bin/python -m twine check --strict dist/*

# The wheel as a new user has it: in an empty environment, far from this folder.
test-wheel: dist
	rm -rf build/wheel_test
	$(PYTHON) -m venv build/wheel_test/env
	build/wheel_test/env/bin/python -m pip install --quiet -c constraints.txt dist/*.whl
	mkdir build/wheel_test/elsewhere
	cd build/wheel_test/elsewhere && sh ../../../tests/try_wheel.sh ../env/bin

clean:
	rm -rf $(NEWEST) $(OLDEST) build dist *.egg-info

$(NEWEST)/installed: constraints.txt setup.cfg
$(NEWEST)/installed: EXTRAS := dev,docs
$(OLDEST)/installed: constraints-oldest.txt setup.cfg
$(OLDEST)/installed: EXTRAS := dev
%/installed:
	$(PYTHON) -m venv $*
	$*/bin/python -m pip install --quiet --upgrade pip
	$*/bin/python -m pip install --quiet -c $< -e '.[$(EXTRAS)]'
	touch $@
