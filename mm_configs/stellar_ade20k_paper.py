# The paper's linear probe of STELLAR-B on ADE20K, 150 classes.
_base_ = ["./_base_/stellar_paper.py", "mmseg::_base_/default_runtime.py"]

# Crops of 0.25 to 1 of the area here, of 0.5 to 1 on the other sets.
train_pipeline = _base_.train_pipeline
train_pipeline[2].update(scale=(0.25, 1.0))
dataset = dict(type="ADE20KDataset", data_root="data/ade/ADEChallengeData2016")
train_dataloader = dict(
    dataset=dict(
        **dataset,
        data_prefix=dict(
            img_path="images/training", seg_map_path="annotations/training"
        ),
        pipeline=train_pipeline,
    )
)
val_dataloader = dict(
    dataset=dict(
        **dataset,
        data_prefix=dict(
            img_path="images/validation", seg_map_path="annotations/validation"
        ),
    )
)
test_dataloader = val_dataloader
model = dict(decode_head=dict(num_classes=150))
log_processor = dict(by_epoch=True)
evaluation = dict(data="ADE20K", protocol="SEGMENTATION_PAPER_ADE20K")
