# CPU: docker build -t voxelmorph_monai . && docker run --rm -v "$PWD:/data" voxelmorph_monai register M.nii.gz F.nii.gz --output out
# GPU: add --build-arg TORCH=https://download.pytorch.org/whl/cuNNN (NNN: the CUDA of your driver) to build, --gpus all to run.
FROM python:3.12-slim
ARG TORCH=https://download.pytorch.org/whl/cpu
RUN pip install --no-cache-dir torch==2.13.0 --index-url "$TORCH"
COPY LICENSE README.md pyproject.toml setup.cfg /src/
COPY voxelmorph_monai /src/voxelmorph_monai
COPY bundles /src/bundles
RUN pip install --no-cache-dir /src && rm -r /src
WORKDIR /data
ENTRYPOINT ["vxm"]
