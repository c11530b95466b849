"""One run, from a frozen configuration to its results: the only place that builds and wires parts.

Values derived from the configuration (learning rate, number of steps) live here and in the log;
the configuration itself stays as given.
"""

import logging
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import paddle

from replknet_paddle.checkpoints.checkpoint_file import WEIGHTS, config_text
from replknet_paddle.checkpoints.run_folder import (
    Checkpoint,
    Progress,
    path_at,
    point_to,
    prepare_run_folder,
    remove_superseded,
    save_checkpoint,
)
from replknet_paddle.config import override
from replknet_paddle.data.loader import Loader
from replknet_paddle.data.transforms.finish import to_device
from replknet_paddle.engine.evaluate import evaluate
from replknet_paddle.engine.precision import Precision, float32_weights
from replknet_paddle.engine.run_log import RunLog, time_left
from replknet_paddle.engine.signals import STOPPING, Stopped, StopSignals
from replknet_paddle.engine.start import (
    check_best_by,
    check_labels,
    find_start,
    from_rank_0,
    load_start,
    report_absent_classes,
    report_shifted_folders,
    resolve_classes,
    weigh_classes,
)
from replknet_paddle.engine.task import CLASSIFICATION, ClassificationTask
from replknet_paddle.engine.train import (
    ADVICE,
    DivergedError,
    TrainState,
    check_is_finite,
    is_synchronized,
    train_epoch,
)
from replknet_paddle.ops import build_convolutions, gpu_choice
from replknet_paddle.optim.ema import ModelEma
from replknet_paddle.optim.optimizer import freeze, load_optimizer_state, optimizer_state
from replknet_paddle.optim.schedule import base_learning_rate
from replknet_paddle.runtime import processes
from replknet_paddle.runtime.errors import InputError, SystemFault, counted
from replknet_paddle.runtime.progress import per_second

logger = logging.getLogger(__name__)

# What metrics.jsonl puts before the figures of each kind of weights.
PREFIXES = {"model": "val", "model_ema": "val_ema"}


def run(
    config,
    *,
    task: ClassificationTask = CLASSIFICATION,
    open_network: Callable | None = None,
    report: Callable | None = None,
) -> None:
    """Train or evaluate as `config` says, in this process and those launched beside it.

    Args:
        config: of config.py; SAVE is the run folder, without which an evaluation writes nothing.
        task: what the network is for: this one, or another class with its methods.
        open_network: config -> what to evaluate instead of the network in Paddle's eager mode, with
            the weights of MODEL.PRETRAINED: a layer with the network's inputs and outputs.
        report: (metrics, config=, class_names=, dataset=, infer=, network=), called on rank 0 with
            what an evaluation found, also of each image in the order of the dataset, with what was
            evaluated, and with the function that gives its outputs for pixels (H, W, 3) uint8.

    Raises:
        InputError, FileNotFoundError: what the configuration names cannot be used.
        DivergedError: the loss is no longer finite.
        SystemFault: the system failed after the first step, or another process has ended.
        Stopped: SIGTERM or SIGINT ended training, after a checkpoint was written.
    """
    log = RunLog(config.SAVE, resume=config.MODEL.RESUME, is_main=processes.rank() == 0)
    with log.log_how_it_ends():
        task.check(config)
        loaders = {False: task.loader(config, is_train=False)}
        if not config.EVAL:
            loaders[True] = task.loader(config, is_train=True)
        for loader in loaders.values():
            loader.start()
        processes.init(deterministic=config.DETERMINISTIC)
        gpu_choice.start_run({})
        paddle.seed(processes.random_seed(config.SEED))
        logger.info(
            "%s, %s on %s, Paddle %s%s",
            config.MODEL.NAME,
            counted(processes.world_size(), "process"),
            paddle.device.get_device(),
            paddle.__version__,
            "" if config.SAVE is None else f", run folder {config.SAVE}",
        )
        if config.AMP and not processes.on_gpu():
            logger.warning("-amp has no effect on CPU: computing in float32")
        from_rank_0(log.lock)
        if config.EVAL:
            run_evaluation(config, task, log, loaders[False], open_network, report)
        else:
            Training(config, task, log, loaders).run()


def run_evaluation(
    config,
    task: ClassificationTask,
    log: RunLog,
    loader: Loader,
    open_network: Callable | None,
    report: Callable | None,
) -> None:
    """Evaluate MODEL.PRETRAINED on the validation list."""
    start = find_start(config, is_opened=open_network is not None)
    config, class_names = resolve_classes(config, start)
    check_labels(loader.dataset, config.MODEL.NUM_CLASSES)
    check_best_by(config, loader.dataset)
    precision = build_precision(config)
    if open_network is not None:
        model = open_network(config)
    else:
        model = build_network(config, task)
        load_start(model, config, task.load_weights, start)
        precision.prepare(model)
    log.open(config, class_names=class_names)
    logger.info("evaluating the images of %s", os.path.abspath(loader.dataset.list_file))
    inference = task.inference(config, model)
    began = time.perf_counter()
    with loader:
        metrics = evaluate(
            model=model,
            inference=inference,
            loader=loader,
            precision=precision,
            sums=task.metric_sums(config, loader),
            progress=log.bar,
        )
    seconds = time.perf_counter() - began
    figures = {**metrics.record(task.prefix), f"{task.prefix}_seconds": round(seconds, 3)}
    log.write_metrics({"epoch": 0, **figures})
    logger.info(
        "%s in %.1f s, %s",
        counted(metrics.images, "image"),
        seconds,
        per_second(metrics.images / seconds, "images"),
    )
    logger.info("%s", metrics)

    @paddle.no_grad()
    def infer(pixels: np.ndarray):
        with precision.autocast():
            return inference(loader.finish(to_device(pixels[None])))

    if report is not None and processes.rank() == 0:
        of_run = dict(config=config, class_names=class_names, dataset=loader.dataset)
        report(metrics, **of_run, infer=infer, network=model)


def build_precision(config) -> Precision:
    """Return mixed precision where it is asked for and possible, else float32."""
    return Precision(enabled=config.AMP, level=config.AMP_LEVEL, dtype=config.AMP_DTYPE)


def synchronizes_batch_norm(config) -> bool:
    """Return whether a training run computes batch statistics over all its GPUs, and warn where it
    does not though it should. All ranks ask alike. InputError: MODEL.SYNC_BN is True, and Paddle
    does not synchronize on these GPUs."""
    wanted = config.MODEL.SYNC_BN
    if not wanted or processes.world_size() == 1:
        return False
    reason = "it needs GPUs"
    if processes.on_gpu():
        if is_synchronized():
            return True
        reason = (
            f"Paddle {paddle.__version__} computes batch statistics on each GPU by itself here, "
            "though asked to synchronize them, and says nothing"
        )
        if wanted != "auto":
            raise InputError(f"MODEL.SYNC_BN is True: {reason}; allowed here: auto or False")
    logger.warning(
        "MODEL.SYNC_BN: %s; each process normalizes by its own %d images, and running statistics "
        "are averaged over the processes",
        reason,
        config.DATA.BATCH_SIZE,
    )
    return False


def build_network(config, task: ClassificationTask, *, sync_bn: bool = False) -> paddle.nn.Layer:
    """Return the network on this process's device, with the fast convolutions."""
    model = task.network(config, sync_bn=sync_bn)
    logger.info(build_convolutions(model, config))
    return model


class Training:
    """The parts of one training run, wired together, and its epochs."""

    def __init__(self, config, task: ClassificationTask, log: RunLog, loaders: dict[bool, Loader]):
        start = find_start(config)
        config, self.class_names = resolve_classes(config, start)
        if config.MODEL.TEMPERATURE != 1:
            logger.info("MODEL.TEMPERATURE is 1 from here on: it was fitted to other weights")
            config = override(config, MODEL__TEMPERATURE=1.0)
        self.config, self.task, self.log = config, task, log
        self.train_loader, self.val_loader = loaders[True], loaders[False]
        for loader in (self.train_loader, self.val_loader):
            check_labels(loader.dataset, config.MODEL.NUM_CLASSES)
            report_absent_classes(loader.dataset, config.MODEL.NUM_CLASSES, self.class_names)
        check_best_by(config, self.val_loader.dataset)
        if processes.rank() == 0:
            report_shifted_folders(self.train_loader.dataset, self.val_loader.dataset)

        train = config.TRAIN
        epoch_like = dict(
            batches=len(self.train_loader.batch_sampler),  # an epoch's, on each process
            batch_size=config.DATA.BATCH_SIZE * processes.world_size(),
            accum_iter=train.ACCUM_ITER,
        )
        steps_per_epoch = epoch_like["batches"] // train.ACCUM_ITER
        weights = weigh_classes(config, self.train_loader.dataset, self.class_names)
        mixup, criterion = task.mixup(config), task.criterion(config, weights)
        sync_bn = synchronizes_batch_norm(config)
        model = build_network(config, task, sync_bn=sync_bn)
        load_start(model, config, task.load_weights, start)
        if train.FREEZE is not None:
            freeze(model, train.FREEZE)
            logger.info("not trained: %s (TRAIN.FREEZE)", ", ".join(train.FREEZE))
            if start.file is None:
                logger.warning("TRAIN.FREEZE without -pretrained: the frozen weights are random")
        learning_rate = task.schedule(config, self.peak_rate(steps_per_epoch), steps_per_epoch)
        precision = build_precision(config)
        optimizer = task.optimizer(
            config, model, lr=learning_rate(0), multi_precision=precision.half_weights
        )
        ema = ModelEma(model, decay=train.MODEL_EMA_DECAY) if train.MODEL_EMA else None
        precision.prepare(model, optimizer)
        self.state = TrainState(
            model=model,
            criterion=criterion,
            optimizer=optimizer,
            learning_rate=learning_rate,
            precision=precision,
            mixup=mixup,
            ema=ema,
            average_statistics=not sync_bn,
        )

        self.resumed_path = None
        self.progress = Progress(
            epoch=train.LAST_EPOCH, step=train.LAST_EPOCH * steps_per_epoch, **epoch_like
        )
        if start.resumed is not None:  # everything but the weights, which `load_start` has loaded
            self.resumed_path = start.resumed.file.path
            self.progress = start.resumed.progress_with(**epoch_like)
            load_optimizer_state(optimizer, model, start.resumed.optimizer)
            precision.load_state(start.resumed.scaler)
            gpu_choice.start_run(start.resumed.convolutions)
            if ema is not None:
                ema.load_state(start.resumed.model_ema)
        self.evaluation_seconds = 0.0

    def peak_rate(self, steps_per_epoch: int) -> float:
        """Return the highest learning rate of the run, and log how it comes about."""
        train, batch_size = self.config.TRAIN, self.config.DATA.BATCH_SIZE
        global_batch = batch_size * train.ACCUM_ITER * processes.world_size()
        peak = base_learning_rate(train.BASE_LR, global_batch, train.LINEAR_SCALED_LR)
        images = len(self.train_loader.dataset)
        left_out = max(0, images - steps_per_epoch * global_batch)
        logger.info(
            "%s training and %s validation images; %s per epoch, %s",
            f"{images:,}",
            f"{len(self.val_loader.dataset):,}",
            counted(steps_per_epoch, "step"),
            "each class equally often"
            if train.SAMPLER == "balanced"
            else f"{counted(left_out, 'image')} left out",
        )
        logger.info(
            "global batch %d = %d x %d accumulated x %s; peak learning rate %.4g",
            global_batch,
            batch_size,
            train.ACCUM_ITER,
            counted(processes.world_size(), "process"),
            peak,
        )
        return peak

    def run(self) -> None:
        """Train the remaining epochs, evaluating and saving as configured."""
        config, log = self.config, self.log
        log.open(config, class_names=self.class_names)
        log.forget_metrics_after(self.progress.epoch - bool(self.progress.record))
        processes.sum_over_ranks([0])  # all ranks have read before files are moved
        if processes.rank() == 0:
            prepare_run_folder(config.SAVE, self.progress, self.resumed_path)
        if self.progress.record:
            logger.info("epoch %d is trained; its evaluation is next", self.progress.epoch)
        elif self.progress.epoch >= config.TRAIN.NUM_EPOCHS:
            logger.info("all %d epochs of TRAIN.NUM_EPOCHS are done", config.TRAIN.NUM_EPOCHS)
        elif self.ends_early():
            logger.info("%s; a higher -patience trains on", self.ends_early())
        elif self.progress.step:
            logger.info(
                "continuing after epoch %d, step %d", self.progress.epoch, self.progress.step
            )
        first_epoch, first_step = self.progress.epoch, self.progress.step
        began = time.monotonic()
        try:
            with StopSignals() as signals, self.train_loader, self.val_loader:
                self.train_epochs(signals)
        except OSError as error:
            if self.progress.step == first_step:
                raise
            raise SystemFault(str(error)) from error
        seconds = time.monotonic() - began
        log.log_summary(config, self.progress, first_epoch, seconds, self.ends_early())

    def ends_early(self) -> str:
        """Return why TRAIN.PATIENCE ends the run here, after an evaluation; else an empty text."""
        train, progress = self.config.TRAIN, self.progress
        is_between = progress.batch or progress.record or progress.epoch >= train.NUM_EPOCHS
        is_evaluated = not is_between and progress.epoch % self.config.VALIDATE_FREQ == 0
        if train.PATIENCE is None or progress.best_epoch is None or not is_evaluated:
            return ""
        waited = progress.epoch - progress.best_epoch
        return f"no better for {counted(waited, 'epoch')}" if waited >= train.PATIENCE else ""

    def train_epochs(self, signals: StopSignals) -> None:
        """Train, save and evaluate epoch by epoch.

        The checkpoint of an epoch is written before its evaluation, which may fail, and again with
        what that has found.
        """
        config = self.config
        is_trained = bool(self.progress.record)  # the epoch that the resumed run did not evaluate
        while is_trained or self.progress.epoch < config.TRAIN.NUM_EPOCHS and not self.ends_early():
            if not is_trained:
                self.train_one_epoch(signals)
            epoch = self.progress.epoch
            is_finished = epoch >= config.TRAIN.NUM_EPOCHS
            is_due = is_trained or epoch % config.VALIDATE_FREQ == 0 or is_finished
            if is_due and not is_trained:
                self.save()
            record, is_best, began = dict(self.progress.record), False, time.monotonic()
            if is_due:
                is_best = self.validate(record)
            self.progress = replace(self.progress, record={})
            self.log.write_metrics(record)
            self.save(is_best=is_best)
            if is_due:
                self.evaluation_seconds = time.monotonic() - began
            is_trained = False
            if not is_finished and not self.ends_early():
                self.stop(processes.sum_over_ranks(signals.requests()))

    def train_one_epoch(self, signals: StopSignals) -> None:
        """Train the rest of the current epoch."""
        config, start = self.config, self.progress
        accum_iter, batches = config.TRAIN.ACCUM_ITER, start.batches
        started, waited, images_here = time.perf_counter(), 0.0, 0
        title = f"epoch {start.epoch + 1}/{config.TRAIN.NUM_EPOCHS}"
        with self.log.bar(title, total=batches, unit="batches", done=start.batch) as bar:
            steps = train_epoch(
                self.state,
                self.train_loader,
                accum_iter=accum_iter,
                seed=config.SEED,
                epoch=start.epoch,
                first_batch=start.batch,
                first_step=start.schedule_step,
                requests=signals.requests,
            )
            for step in steps:
                loss_sum, images = self.progress.epoch_sums
                self.progress = replace(
                    self.progress,
                    batch=step.batch,
                    step=self.progress.step + 1,
                    epoch_sums=(loss_sum + step.loss * step.images, images + step.images),
                )
                images_here += step.images
                waited += step.data_seconds
                seconds = time.perf_counter() - started
                left = time_left(
                    self.progress,
                    epochs=config.TRAIN.NUM_EPOCHS,
                    every=config.VALIDATE_FREQ,
                    batch_seconds=seconds / (step.batch - start.batch),
                    evaluation_seconds=self.evaluation_seconds,
                )
                self.log.show_step(
                    bar,
                    [
                        f"loss {step.loss:.4f}",
                        f"lr {step.lr:.3g}",
                        per_second(images_here / seconds, "images"),
                        f"data wait {waited / seconds:.0%}",
                    ],
                    left=left,
                    batch=step.batch,
                    is_due=step.batch % config.REPORT_FREQ < accum_iter,
                )
                if any(step.requests):
                    bar.close()  # what is said of an interruption stands alone
                self.log.write_step(self.progress.step)
                if step.batch < batches:  # after the last one, train_epochs does this
                    every = config.SAVE_STEPS
                    if any(step.requests) or every and self.progress.step % every == 0:
                        self.save()
                    self.stop(step.requests)
        loss_sum, images = self.progress.epoch_sums
        seconds = time.perf_counter() - started
        self.progress = replace(
            self.progress, epoch=start.epoch + 1, batch=0, epoch_sums=(0.0, 0.0)
        )
        record = {
            "epoch": self.progress.epoch,
            "step": self.progress.step,
            "learning_rate": self.state.learning_rate(self.progress.schedule_step - 1),
            "train_loss": loss_sum / images,
            "train_seconds": round(seconds, 3),
            "train_images_per_second": round(images_here / seconds, 3),
        }
        self.progress = replace(self.progress, record=record)

    def validate(self, record: dict) -> bool:
        """Evaluate the raw and the EMA weights, and add their figures to `record`; return whether
        the higher score is the best of the run so far. After the last epoch, raise DivergedError
        where neither loss is finite."""
        state = self.state
        inference = self.task.inference(self.config, state.model)

        def loop():
            return evaluate(
                model=state.model,
                inference=inference,
                loader=self.val_loader,
                precision=state.precision,
                sums=self.task.metric_sums(self.config, self.val_loader),
                progress=self.log.bar,
            )

        results = {"model": loop()}
        if state.ema is not None:
            with state.ema.applied_to(state.model):
                results["model_ema"] = loop()
        for kind, metrics in results.items():
            record.update(metrics.record(PREFIXES[kind]))
            logger.info("epoch %d, %s: %s", self.progress.epoch, WEIGHTS[kind], metrics)
        kind = max(results, key=lambda kind: results[kind].score)
        score, best_before = results[kind].score, self.progress.best_score
        if score < 0:
            text = f"epoch {self.progress.epoch}: the loss of the evaluation is not finite"
            if self.progress.epoch >= self.config.TRAIN.NUM_EPOCHS:
                raise DivergedError(f"{text}. {ADVICE}")
            logger.warning("%s", text)
        self.progress = replace(
            self.progress, better_weights=kind, best_score=max(score, best_before)
        )
        return score > best_before

    def stop(self, requests: Sequence[float]) -> None:
        """Raise Stopped where `requests`, the sums over all processes, name a signal and all have
        saved."""
        if not any(requests):
            return
        processes.sum_over_ranks([0])  # the first to exit ends the others: rank 0 must have saved
        number = next(number for number, asked in zip(STOPPING, requests) if asked)
        logger.info(
            "stopped by %s after epoch %d, step %d; -resume=%s continues",
            number.name,
            self.progress.epoch,
            self.progress.step,
            os.path.abspath(self.config.SAVE),
        )
        raise Stopped(number)

    def save(self, *, is_best: bool = False) -> None:
        """Write a checkpoint on rank 0, and delete those that it supersedes. Weights that are not
        finite raise DivergedError instead."""
        folder, state = self.config.SAVE, self.state
        path = path_at(folder, self.progress)
        if is_best:
            self.progress = replace(self.progress, best_checkpoint=os.path.basename(path))
        if processes.rank() != 0:
            return
        checkpoint = Checkpoint(
            config=config_text(self.config),
            progress=self.progress,
            model=float32_weights(state.model, state.optimizer),
            model_ema={} if state.ema is None else state.ema.state(),
            optimizer=optimizer_state(state.optimizer, state.model),
            scaler=state.precision.state(),
            class_names=self.class_names,
            convolutions=gpu_choice.choices(),
        )
        check_is_finite(checkpoint)
        save_checkpoint(path, checkpoint)
        point_to(folder, "last", path)
        if is_best:
            point_to(folder, "best", path)
        remove_superseded(
            folder, keep_every=self.config.SAVE_FREQ, keep_newest=self.config.SAVE_KEEP
        )
