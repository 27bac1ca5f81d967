"""The torch network behind the signature: float32 timesteps in, `out_sample` out."""

from typing import Any

from torch import Tensor, nn

from dpctl.signature import unet_arguments


class Network(nn.Module):
    """A UNet with the inputs and the output of `dpctl.signature`: what eager runs and what the exporter sees."""

    def __init__(self, unet: Any) -> None:
        super().__init__()
        self.unet = unet

    def forward(
        self,
        sample: Tensor,
        timestep: Tensor,
        class_labels: Tensor | None = None,
        encoder_hidden_states: Tensor | None = None,
        text_embeds: Tensor | None = None,
        time_ids: Tensor | None = None,
        timestep_cond: Tensor | None = None,
    ) -> Tensor:
        # A learned time embedding is a table: it takes whole timesteps.
        if self.unet.config.time_embedding_type == "learned":
            timestep = timestep.long()
        # Named one by one: the exporter names the graph's inputs by them.
        more = {
            "encoder_hidden_states": encoder_hidden_states,
            "text_embeds": text_embeds,
            "time_ids": time_ids,
            "timestep_cond": timestep_cond,
        }
        conditions = unet_arguments({name: value for name, value in more.items() if value is not None})
        return self.unet(sample, timestep, class_labels=class_labels, return_dict=False, **conditions)[0]
