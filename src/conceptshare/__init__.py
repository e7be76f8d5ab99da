"""conceptshare finds which concepts image, text and multimodal encoders share."""
