# make sample: clips, a sheet and a curve of the models that are shipped.   make demo: distill the teacher that is shipped,
# sample, evaluate.   make demo-causal: the same chunk by chunk, after the teacher has learned longer clips.
# make reproduce: every run that results/ lacks, which takes hours, and its tables.   make test: the whole test suite.
# make lint: names, imports, lines.   make assets: what is shipped, anew.
PYTHON ?= python3
# Two threads wait for each other longer than a network this small computes.
export OMP_NUM_THREADS ?= 1
RUN ?= runs/demo
LOOP ?= runs/demo-loop
SHIPPED = assets/toy
TEACHER ?= $(SHIPPED)/pretrain
BIN = .venv/bin

.PHONY: sample demo demo-causal reproduce assets test test-half test-rest lint

sample: .venv/ready
	$(BIN)/python sample.py --run-dir $(SHIPPED) --prompts assets/prompts.txt --steps 4 --out runs/shipped/clips/clip.mp4 --sheet runs/shipped/clips/sheet.png
	@echo "clips: runs/shipped/clips    figure: $(SHIPPED)/curve.png    page to play with: $(BIN)/python play.py"

# Fewer updates than the recipe's, to fit a quarter of an hour.
demo: .venv/ready
	$(BIN)/python train.py --stage flowmap --base $(TEACHER) --run-dir $(RUN) --steps 1800
	$(BIN)/python train.py --stage distill --run-dir $(RUN) --steps 400
	$(BIN)/python sample.py --run-dir $(RUN) --prompts assets/prompts.txt --steps 4 --out $(RUN)/clips/clip.mp4 --sheet $(RUN)/clips/sheet.png
	$(BIN)/python eval.py --run-dir $(RUN) --steps 1,2,4,8,32 --count 240
	@echo "clips: $(RUN)/clips    figure: $(RUN)/eval/curve.png    table: $(RUN)/eval/table.md    page to play with: $(BIN)/python play.py --run-dir $(RUN)"

demo-causal: .venv/ready
	$(BIN)/python train.py --stage pretrain --run-dir $(LOOP) --data loop --frames 16 --base $(TEACHER) --steps 1000 --lr 1e-3
	$(BIN)/python train.py --causal --stage flowmap --run-dir $(LOOP) --steps 1000
	$(BIN)/python train.py --causal --stage distill --run-dir $(LOOP) --steps 100
	$(BIN)/python sample.py --causal --run-dir $(LOOP) --prompts assets/prompts.txt --steps 4 --out $(LOOP)/clips/clip.mp4 --sheet $(LOOP)/clips/sheet.png
	$(BIN)/python eval.py --run-dir $(LOOP) --models causal-distill --steps 1,4,32 --count 240
	@echo "clips: $(LOOP)/clips    figure: $(LOOP)/eval/curve.png    table: $(LOOP)/eval/table.md"

reproduce: .venv/ready
	$(BIN)/python reproduce.py

# From what make reproduce trained with seed 1, if it is still there; of a clone, whose records are there already, take
# away results/student.1.json and causal-student.1.json, then: python reproduce.py --runs student causal-student --seeds 2
EVIDENCE = runs/reproduce/seed-1
assets: .venv/ready
	$(BIN)/python -c "import runs; runs.ship('$(EVIDENCE)/student', '$(EVIDENCE)/causal-student', '$(SHIPPED)')"
	$(BIN)/python eval.py --run-dir $(SHIPPED) --out runs/shipped --count 240
	cp runs/shipped/table.md runs/shipped/curve.png $(SHIPPED)
	$(BIN)/python eval.py --run-dir $(SHIPPED) --models pretrain,distill --steps 1,2,4,8,32 --count 48 --out runs/shipped/side-by-side
	cp runs/shipped/side-by-side/compare.gif docs/compare.gif

# Two halves of about the same length, as most machines have two cores; tests use one each.
HALF = tests/test_scale.py tests/test_accidents.py tests/test_fuzz.py tests/test_play.py tests/test_bad_input.py tests/test_reproduce.py

test: .venv/ready
	$(MAKE) --no-print-directory -j 2 test-half test-rest

test-half: .venv/ready
	$(BIN)/python -m pytest -q $(HALF)

test-rest: .venv/ready
	$(BIN)/python -m pytest -q tests $(HALF:%=--ignore=%)

lint: .venv/ready
	$(BIN)/ruff check .

.venv/ready: requirements.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=python3.11 ...")'
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check -r requirements.txt
	touch $@
