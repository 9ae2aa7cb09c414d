import lightning
import pytest
import torch

from zimage_lit.callbacks.ema import EMA, averaged_weights


class Line(lightning.LightningModule):
    """A stage in miniature: its backbone is one linear layer; `history` keeps the weights after every step."""

    def __init__(self, dtype=torch.float32):
        super().__init__()
        self.backbone = torch.nn.Linear(3, 2, dtype=dtype)
        self.history = [self.backbone.weight.detach().clone()]

    def training_step(self, batch, batch_idx):
        return (self.backbone(batch.to(self.backbone.weight.dtype)) - 1).square().mean()

    def on_train_batch_end(self, outputs, batch, batch_idx):
        self.history.append(self.backbone.weight.detach().clone())

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.3)


def fit(module, callback, steps=12, **settings):
    trainer = lightning.Trainer(
        max_steps=steps, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, callbacks=[callback], **settings,
    )  # fmt: skip
    data = torch.randn(100, 3, generator=torch.Generator().manual_seed(0))
    trainer.fit(module, torch.utils.data.DataLoader(data, batch_size=4))
    return trainer


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("warmup", [False, True])
def test_average_equals_the_recursion_written_out_in_float32(warmup, dtype):
    module, ema = Line(dtype), EMA(decay=0.9, warmup=warmup)
    fit(module, ema)
    average = module.history[0].float()
    for n, weights in enumerate(module.history[1:], start=1):
        decay = min(0.9, (1 + n) / (10 + n)) if warmup else 0.9
        average = decay * average + (1 - decay) * weights.float()
    torch.testing.assert_close(ema.average["weight"], average)
    assert not torch.allclose(average, module.history[-1].float(), atol=1e-4)


def test_accumulated_batches_count_as_one_update():
    ema = EMA()
    trainer = fit(Line(), ema, steps=5, accumulate_grad_batches=4)
    assert trainer.global_step == ema.updates == 5


def test_the_average_is_applied_only_inside_the_context():
    module, ema = Line(), EMA(decay=0.9)
    trainer = fit(module, ema)
    trained = module.backbone.weight.detach().clone()
    with averaged_weights(trainer, module):
        assert torch.equal(module.backbone.weight, ema.average["weight"])
    assert torch.equal(module.backbone.weight, trained)
    with pytest.raises(RuntimeError, match="in between"), averaged_weights(trainer, module):
        raise RuntimeError("in between")
    assert torch.equal(module.backbone.weight, trained)


def test_without_the_callback_the_trained_weights_are_used():
    module = Line()
    trainer = fit(module, lightning.Callback())
    before = module.backbone.weight.detach().clone()
    with averaged_weights(trainer, module):
        assert torch.equal(module.backbone.weight, before)
