"""One run, from a frozen configuration to its results: the only place that builds and wires parts.

Values derived from the configuration (learning rate, number of steps) live here and in the log;
the configuration itself stays as given.
"""

import logging
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import replace

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
from replknet_paddle.data.loader import Loader
from replknet_paddle.engine.build import build_network, build_precision, synchronizes_batch_norm
from replknet_paddle.engine.evaluate import evaluate
from replknet_paddle.engine.outcomes import Evaluation, OutcomeSums
from replknet_paddle.engine.precision import float32_weights
from replknet_paddle.engine.run_log import RunLog
from replknet_paddle.engine.signals import Stopped, StopSignals
from replknet_paddle.engine.start import (
    check_labels,
    check_weights_are_named,
    find_start,
    from_rank_0,
    load_start,
    report_absent_classes,
    report_shifted_folders,
    resolve_classes,
)
from replknet_paddle.engine.summary import log_summary
from replknet_paddle.engine.task import CLASSIFICATION, Task
from replknet_paddle.engine.time_left import text_of_time_left
from replknet_paddle.engine.train import (
    ADVICE,
    DivergedError,
    Parts,
    check_is_finite,
    train_epoch,
)
from replknet_paddle.optim.ema import ModelEma
from replknet_paddle.optim.optimizer import (
    load_optimizer_state,
    optimizer_state,
)
from replknet_paddle.optim.schedule import base_learning_rate
from replknet_paddle.runtime import processes
from replknet_paddle.runtime.errors import SystemFault

logger = logging.getLogger(__name__)


def run(
    config,
    *,
    task: Task = CLASSIFICATION,
    open_network: Callable | None = None,
    report: Callable[[Evaluation], None] | None = None,
):
    """Train or evaluate as `config` says, in this process and those launched beside it.

    Args:
        config: of config.py, with SAVE, the run folder, set.
        task: what the network is for.
        open_network: config -> what to evaluate instead of the network in Paddle's eager mode, with
            the weights of MODEL.PRETRAINED: a layer with the network's inputs and outputs.
        report: called on rank 0 with what the evaluation of a classifier found.

    Returns:
        The last evaluation's metrics.

    Raises:
        InputError, FileNotFoundError: what the configuration names cannot be used.
        DivergedError: the loss is no longer finite.
        SystemFault: the system failed after the first step, or another process has ended.
        Stopped: SIGTERM or SIGINT ended training, after a checkpoint was written.
    """
    log = RunLog(is_main=processes.rank() == 0)
    with log.with_its_end():
        return run_logged(config, task, log, open_network, report)


def run_logged(
    config, task: Task, log: RunLog, open_network: Callable | None, report: Callable | None
):
    """What `run` does once there is a log."""
    task.check(config)
    check_weights_are_named(config)
    loaders = {False: task.loader(config, is_train=False)}
    if not config.EVAL:
        loaders[True] = task.loader(config, is_train=True)
    for loader in loaders.values():
        loader.start()
    processes.init(deterministic=config.DETERMINISTIC)
    paddle.seed(processes.random_seed(config.SEED))
    logger.info(
        "%s, %d process(es) on %s, Paddle %s, run folder %s",
        config.MODEL.NAME,
        processes.world_size(),
        paddle.device.get_device(),
        paddle.__version__,
        config.SAVE,
    )
    if config.AMP and not processes.on_gpu():
        logger.warning("-amp has no effect on CPU: computing in float32")
    from_rank_0(lambda: log.lock(config.SAVE, resume=config.MODEL.RESUME))
    if config.EVAL:
        return run_evaluation(config, task, log, loaders[False], open_network, report)
    return Training(config, task, log, loaders).run()


def run_evaluation(
    config,
    task: Task,
    log: RunLog,
    loader: Loader,
    open_network: Callable | None,
    report: Callable | None,
):
    """Evaluate MODEL.PRETRAINED on the validation list."""
    start = find_start(config, is_opened=open_network is not None)
    config, class_names = resolve_classes(config, start.classes, start.path)
    check_labels(loader.dataset, config.MODEL.NUM_CLASSES)
    precision = build_precision(config)
    if open_network is not None:
        model = open_network(config)
    else:
        model = build_network(config, task)
        load_start(model, config, task.load_weights, start)
        precision.prepare(model)
    log.open(config.SAVE, config, class_names=class_names)
    logger.info("evaluating the images of %s", os.path.abspath(loader.dataset.list_file))
    sums = task.metric_sums(config)
    if report is not None:
        sums = OutcomeSums(sums, loader, config.MODEL.NUM_CLASSES)
    began = time.perf_counter()
    with loader:
        metrics = evaluate(
            model=model,
            inference=task.inference(config, model),
            loader=loader,
            precision=precision,
            sums=sums,
            progress=log.bar,
        )
    seconds = time.perf_counter() - began
    log.write_metrics({"epoch": 0, **metrics.record("val"), "val_seconds": round(seconds, 3)})
    logger.info(
        "%d images in %.1f s, %.1f images/s", metrics.images, seconds, metrics.images / seconds
    )
    logger.info("%s", metrics)
    if report is not None:
        outcomes = sums.outcomes()
        if processes.rank() == 0:
            report(Evaluation(config, class_names, metrics, outcomes, loader.dataset))
    return metrics


class Training:
    """The parts of one training run, wired together, and its epochs."""

    def __init__(self, config, task: Task, log: RunLog, loaders: dict[bool, Loader]):
        start = find_start(config)
        config, self.class_names = resolve_classes(config, start.classes, start.path)
        self.config = config
        self.task = task
        self.log = log
        self.train_loader, self.val_loader = loaders[True], loaders[False]
        for loader in (self.train_loader, self.val_loader):
            check_labels(loader.dataset, config.MODEL.NUM_CLASSES)
            report_absent_classes(loader.dataset, config.MODEL.NUM_CLASSES, self.class_names)
        if processes.rank() == 0:
            report_shifted_folders(self.train_loader.dataset, self.val_loader.dataset)
        self.batches = len(self.train_loader.batch_sampler)  # an epoch's, on each process
        self.steps_per_epoch = self.batches // config.TRAIN.ACCUM_ITER
        self.mixup = task.mixup(config)
        self.criterion = task.criterion(config)

        self.model = build_network(config, task)
        load_start(self.model, config, task.load_weights, start)
        self.learning_rate = self.build_schedule()
        self.precision = build_precision(config)
        self.optimizer = task.optimizer(
            config,
            self.model,
            lr=self.learning_rate(0),
            multi_precision=self.precision.half_weights,
        )
        self.ema = None
        if config.TRAIN.MODEL_EMA:
            self.ema = ModelEma(self.model, decay=config.TRAIN.MODEL_EMA_DECAY)
        self.precision.prepare(self.model, self.optimizer)
        self.parts = Parts(
            model=self.model,
            criterion=self.criterion,
            optimizer=self.optimizer,
            learning_rate=self.learning_rate,
            precision=self.precision,
            mixup=self.mixup,
            ema=self.ema,
            average_statistics=not synchronizes_batch_norm(config),
        )

        self.progress = Progress(
            epoch=config.TRAIN.LAST_EPOCH,
            batches=self.batches,
            batch_size=config.DATA.BATCH_SIZE * processes.world_size(),
            accum_iter=config.TRAIN.ACCUM_ITER,
            step=config.TRAIN.LAST_EPOCH * self.steps_per_epoch,
        )
        self.resumed_path = None
        if start.resumed is not None:
            self.restore(start.resumed)
        self.evaluation_seconds = 0.0

    def build_schedule(self) -> Callable[[int], float]:
        """The learning rate of each optimizer step of the run."""
        train = self.config.TRAIN
        global_batch = self.config.DATA.BATCH_SIZE * train.ACCUM_ITER * processes.world_size()
        peak = base_learning_rate(train.BASE_LR, global_batch, train.LINEAR_SCALED_LR)
        images = len(self.train_loader.dataset)
        logger.info(
            "%d training and %d validation images; global batch %d = %d x %d accumulated "
            "x %d process(es); %d steps per epoch, which leave %d images out of each epoch; "
            "peak learning rate %.4g",
            images,
            len(self.val_loader.dataset),
            global_batch,
            self.config.DATA.BATCH_SIZE,
            train.ACCUM_ITER,
            processes.world_size(),
            self.steps_per_epoch,
            max(0, images - self.steps_per_epoch * global_batch),
            peak,
        )
        return self.task.schedule(self.config, peak, self.steps_per_epoch)

    def restore(self, resumed: Checkpoint) -> None:
        """Take over everything but the weights from a checkpoint."""
        self.resumed_path = resumed.file.path
        self.progress = resumed.progress_with(
            batches=self.progress.batches,
            batch_size=self.progress.batch_size,
            accum_iter=self.progress.accum_iter,
        )
        load_optimizer_state(self.optimizer, self.model, resumed.optimizer)
        self.precision.load_state(resumed.scaler)
        if self.ema is not None:
            self.ema.load_state(resumed.model_ema)

    def run(self):
        """Train the remaining epochs, evaluating and saving as configured."""
        config, log = self.config, self.log
        log.open(config.SAVE, config, resume=config.MODEL.RESUME, class_names=self.class_names)
        log.forget_metrics_after(self.progress.epoch - bool(self.progress.record))
        processes.sum_over_ranks([0])  # all ranks have read before files are moved
        if processes.rank() == 0:
            prepare_run_folder(config.SAVE, self.progress, self.resumed_path)
        if self.progress.record:
            logger.info("epoch %d is trained; its evaluation is next", self.progress.epoch)
        elif self.progress.epoch >= config.TRAIN.NUM_EPOCHS:
            logger.info("all %d epochs of TRAIN.NUM_EPOCHS are done", config.TRAIN.NUM_EPOCHS)
        elif self.progress.step:
            logger.info(
                "continuing after epoch %d, step %d", self.progress.epoch, self.progress.step
            )
        first_epoch, first_step = self.progress.epoch, self.progress.step
        began = time.monotonic()
        try:
            with StopSignals() as signals, self.train_loader, self.val_loader:
                metrics = self.train_epochs(signals)
        except OSError as error:
            if self.progress.step == first_step:
                raise
            raise SystemFault(str(error)) from error
        log_summary(config, self.progress, first_epoch, time.monotonic() - began)
        return metrics

    def train_epochs(self, signals: StopSignals):
        """Train, save and evaluate epoch by epoch; the last evaluation, if there was any.

        The checkpoint of an epoch is written before its evaluation, which may fail, and again with
        what that has found.
        """
        config = self.config
        metrics = None
        is_trained = bool(self.progress.record)  # the epoch that the resumed run did not evaluate
        while is_trained or self.progress.epoch < config.TRAIN.NUM_EPOCHS:
            if not is_trained:
                self.train_one_epoch(signals)
            epoch = self.progress.epoch
            is_finished = epoch >= config.TRAIN.NUM_EPOCHS
            is_due = is_trained or epoch % config.VALIDATE_FREQ == 0 or is_finished
            if is_due and not is_trained:
                self.save()
            record, is_best, began = dict(self.progress.record), False, time.monotonic()
            if is_due:
                metrics, is_best = self.validate(record)
            self.progress = replace(self.progress, record={})
            self.log.write_metrics(record)
            self.save(is_best=is_best)
            if is_due:
                self.evaluation_seconds = time.monotonic() - began
            is_trained = False
            if not is_finished:
                self.stop(processes.sum_over_ranks(signals.requests()))
        return metrics

    def train_one_epoch(self, signals: StopSignals) -> None:
        """Train the rest of the current epoch."""
        config, start = self.config, self.progress
        started, waited, images_here = time.perf_counter(), 0.0, 0
        title = f"epoch {start.epoch + 1}/{config.TRAIN.NUM_EPOCHS}"
        with self.log.bar(total=self.batches, initial=start.batch, desc=title) as bar:
            steps = train_epoch(
                self.parts,
                self.train_loader,
                accum_iter=config.TRAIN.ACCUM_ITER,
                seed=config.SEED,
                epoch=start.epoch,
                first_batch=start.batch,
                first_step=start.schedule_step,
                requests=signals.requests,
            )
            for step in steps if start.batch < self.batches else ():
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
                left = text_of_time_left(
                    self.progress,
                    epochs=config.TRAIN.NUM_EPOCHS,
                    every=config.VALIDATE_FREQ,
                    batch_seconds=seconds / (step.batch - start.batch),
                    evaluation_seconds=self.evaluation_seconds,
                )
                self.log.show_step(
                    bar,
                    f"loss {step.loss:.4f}, lr {step.lr:.3g}, {images_here / seconds:.1f} "
                    f"images/s, data wait {waited / seconds:.0%}, {left} left",
                    title=title,
                    batch=step.batch,
                    is_due=step.batch % config.REPORT_FREQ < config.TRAIN.ACCUM_ITER,
                )
                self.log.write_step(self.progress.step)
                if step.batch < self.batches:  # after the last one, train_epochs does this
                    self.save_if_due()
                    if any(step.requests):
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
            "learning_rate": self.learning_rate(self.progress.schedule_step - 1),
            "train_loss": loss_sum / images,
            "train_seconds": round(seconds, 3),
            "train_images_per_second": round(images_here / seconds, 3),
        }
        self.progress = replace(self.progress, record=record)

    def validate(self, record: dict) -> tuple:
        """Evaluate the weights and the EMA weights; adds to `record`.

        Returns:
            The better of the two metrics, and whether it is the best of the run.

        Raises:
            DivergedError: after the last epoch, neither of the two has a finite loss.
        """
        inference = self.task.inference(self.config, self.model)

        def loop():
            return evaluate(
                model=self.model,
                inference=inference,
                loader=self.val_loader,
                precision=self.precision,
                sums=self.task.metric_sums(self.config),
                progress=self.log.bar,
            )

        results = {"val": loop()}
        if self.ema is not None:
            with self.ema.applied_to(self.model):
                results["val_ema"] = loop()
        kinds = {"val": "model", "val_ema": "model_ema"}
        for name, metrics in results.items():
            record.update(metrics.record(name))
            logger.info(
                "epoch %d, %s: %s",
                self.progress.epoch,
                WEIGHTS[kinds[name]],
                metrics,
            )
        better = max(results, key=lambda name: results[name].score)
        best = results[better]
        if best.score < 0:
            text = f"epoch {self.progress.epoch}: the loss of the evaluation is not finite"
            if self.progress.epoch >= self.config.TRAIN.NUM_EPOCHS:
                raise DivergedError(f"{text}. {ADVICE}")
            logger.warning("%s", text)
        self.progress = replace(self.progress, better_weights=kinds[better])
        is_best = best.score > self.progress.best_score
        if is_best:
            self.progress = replace(self.progress, best_score=best.score)
        return best, is_best

    def save_if_due(self) -> None:
        """Save in mid-epoch, every SAVE_STEPS steps."""
        steps = self.config.SAVE_STEPS
        if steps is not None and self.progress.step % steps == 0:
            self.save()

    def stop(self, requests: Sequence[float]) -> None:
        """Raise Stopped, on all processes, where any of them has had a signal and all have saved.

        Args:
            requests: sums over all processes of `StopSignals.requests`.
        """
        if not any(requests):
            return
        processes.sum_over_ranks([0])  # the first to exit ends the others: rank 0 must have saved
        number = StopSignals.number(requests)
        logger.info(
            "stopped by %s after epoch %d, step %d; -resume=%s continues",
            number.name,
            self.progress.epoch,
            self.progress.step,
            os.path.abspath(self.config.SAVE),
        )
        raise Stopped(number)

    def save(self, *, is_best: bool = False) -> None:
        """Write a checkpoint, and delete those that it supersedes.

        Raises:
            DivergedError: on rank 0, for weights that are not finite; nothing is written.
            OSError: on rank 0, where it cannot be written.
        """
        if processes.rank() != 0:
            return
        folder = self.config.SAVE
        path = path_at(folder, self.progress)
        if is_best:
            self.progress = replace(self.progress, best_checkpoint=os.path.basename(path))
        checkpoint = Checkpoint(
            config=config_text(self.config),
            progress=self.progress,
            model=float32_weights(self.model, self.optimizer),
            model_ema={} if self.ema is None else self.ema.state(),
            optimizer=optimizer_state(self.optimizer, self.model),
            scaler=self.precision.state(),
            class_names=self.class_names,
        )
        check_is_finite(checkpoint)
        save_checkpoint(path, checkpoint)
        point_to(folder, "last", path)
        if is_best:
            point_to(folder, "best", path)
        remove_superseded(
            folder, keep_every=self.config.SAVE_FREQ, keep_newest=self.config.SAVE_KEEP
        )
