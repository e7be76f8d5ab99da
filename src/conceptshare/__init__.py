"""conceptshare: which concepts do image, text and multimodal encoders share?"""
