# Sourced by tests/gpu/run, which says root, nvcc, cuda, arch: the CUDA backend's test and its bench, built by the two
# compilers alone.
backend=build/gpu-backend
include='' libs=()

# cuDNN's headers and library: beside the toolkit, the system's, or those of a Python package.
find_cudnn() {
  local dir i l lib
  for dir in ${CUDNN_ROOT:+"$CUDNN_ROOT"} "$cuda" "$cuda/targets/x86_64-linux" /usr/local /usr \
    $(python3 -c 'import nvidia.cudnn as m; print(list(m.__path__)[0])' 2>/dev/null || true); do
    for i in "$dir/include" "$dir/include/x86_64-linux-gnu"; do
      [[ -z $include && -f $i/cudnn_graph.h ]] || continue
      for l in "$dir/lib64" "$dir/lib" "$dir/lib/x86_64-linux-gnu" "$cuda/lib64" "$cuda/lib"; do
        lib=$(compgen -G "$l/libcudnn.so*" | head -n 1 || true)
        [[ -n $lib ]] && include=$i && libs=("$lib" "-Wl,-rpath,$l") && break
      done
    done
  done
  [[ -n $include ]] || die "no cuDNN: cudnn_graph.h or libcudnn.so is missing; CUDNN_ROOT may name its folder"
  say "cuDNN: $include, ${libs[0]}"
  for l in "$cuda/lib64" "$cuda/lib" "$cuda/targets/x86_64-linux/lib"; do
    [[ ! -d $l ]] || libs+=("-L$l" "-Wl,-rpath,$l")
  done
}

objects=() jobs=()
# compile FILE COMMAND...: in the background, its object in $objects
compile() {
  local object=$backend/${1//\//_}.o
  [[ $1 == tests/* ]] || objects+=("$object")
  "${@:2}" -c "$1" -o "$object" &
  jobs+=($!)
}

build_backend() {
  local f j program cflags shim=() cmocka=-lcmocka
  find_cudnn
  rm -rf "$backend"
  mkdir -p "$backend"
  cflags=(-std=gnu11 -Wall -Wextra -Wpedantic -Werror -D_GNU_SOURCE -fno-strict-aliasing -I. -isystem "$cuda/include"
    -isystem "$include")
  printf '#include <%s>\n' stdarg.h stddef.h stdint.h setjmp.h cmocka.h | gcc -E - >/dev/null 2>&1 ||
    { shim=(-Itests/gpu/shim) && cmocka=; }
  for f in kernels/cuda/*.cu; do
    compile "$f" "$nvcc" -std=c++17 -O3 -lineinfo -I. -gencode "arch=compute_$arch,code=sm_$arch" \
      -Xcompiler -Wall,-Wextra
  done
  for f in kernels/*.c kernels/cuda/*.c proto/err.c; do compile "$f" gcc "${cflags[@]}" -O2 -g; done
  for f in kernels/cpu/*.c; do
    compile "$f" gcc "${cflags[@]}" -O3 -g -march=native -fno-math-errno -fno-trapping-math
  done
  compile tests/unit/test_cuda.c gcc "${cflags[@]}" "${shim[@]}" -O1 -g
  compile tests/bench/cuda_bench.c gcc "${cflags[@]}" -O2 -g
  for j in "${jobs[@]}"; do wait "$j" || return 1; done
  for program in test_cuda:tests_unit_test_cuda.c.o cuda_bench:tests_bench_cuda_bench.c.o; do
    g++ -o "$backend/${program%%:*}" "$backend/${program#*:}" "${objects[@]}" "${libs[@]}" -lcublasLt -lcudart $cmocka \
      -lpthread -lm -ldl || return 1
  done
}
