// Arrays from Python through the buffer protocol, which costs a tenth of a microsecond each, checked where they are used.
#pragma once
#include <nanobind/nanobind.h>

#include <cstdint>
#include <initializer_list>
#include <stdexcept>
#include <string>

namespace moestro {

namespace nb = nanobind;

constexpr int64_t LONG = 1 << 15;  // elements or multiply-adds from which on other Python threads may run meanwhile

class View {
public:
    View(nb::handle object, const char* name, bool writable = false) : name_(name) {
        if (PyObject_GetBuffer(object.ptr(), &buffer_, PyBUF_STRIDES | PyBUF_FORMAT | (writable ? PyBUF_WRITABLE : 0)) != 0)
            throw nb::python_error();
    }
    ~View() { PyBuffer_Release(&buffer_); }
    View(const View&) = delete;
    View& operator=(const View&) = delete;

    char type() const {  // 'f' float32, 'e' float16, 'H' uint16, 'i' int32, 'l' int64
        const char* f = buffer_.format ? buffer_.format : "B";
        while (*f == '@' || *f == '=' || *f == '<') ++f;
        if (f[0] == 0 || f[1] != 0) return '?';
        if (*f == 'q' || *f == 'l') return buffer_.itemsize == 8 ? 'l' : 'i';
        return *f;
    }
    int axes() const { return buffer_.ndim; }
    int64_t size(int axis) const { return buffer_.shape[axis]; }
    int64_t stride(int axis) const { return buffer_.strides[axis]; }
    int64_t items() const { return buffer_.itemsize ? buffer_.len / buffer_.itemsize : 0; }
    template <class T>
    T* data() const {
        return static_cast<T*>(buffer_.buf);
    }

    std::string shape() const {
        std::string text = "(";
        for (int i = 0; i < axes(); ++i) text += (i ? ", " : "") + std::to_string(size(i));
        return text + ")";
    }
    [[noreturn]] void refuse(const std::string& expected) const {
        const char t = type();
        const char* kind = t == 'f' ? "float32" : t == 'e' ? "float16" : t == 'd' ? "float64" : t == 'H' ? "uint16" : t == 'l' ? "int64"
                         : t == 'i' ? "int32" : buffer_.format ? buffer_.format : "bytes";
        std::string text = std::string(name_) + " is " + kind + " " + shape() + ", strides (";
        for (int i = 0; i < axes(); ++i) text += (i ? ", " : "") + std::to_string(stride(i));
        throw std::invalid_argument(text + "); expected " + expected);
    }
    bool packed() const {  // the last axis is contiguous
        return buffer_.len == 0 || size(axes() - 1) == 1 || stride(axes() - 1) == buffer_.itemsize;
    }
    void need(char kind, std::initializer_list<int64_t> sizes, const char* label) const {
        bool fits = type() == kind && axes() == static_cast<int>(sizes.size()) && packed();
        int axis = 0;
        std::string text;
        for (int64_t size_wanted : sizes) {
            fits = fits && size(axis) == size_wanted;
            ++axis;
        }
        if (fits) return;
        for (int64_t size_wanted : sizes) text += (text.empty() ? "" : ", ") + std::to_string(size_wanted);
        refuse(std::string(label) + " (" + text + ")");
    }

private:
    Py_buffer buffer_{};
    const char* name_;
};

class MaybeUnlocked {  // gives up the interpreter lock for long work only
public:
    explicit MaybeUnlocked(bool is_long) {
        if (is_long) state_ = PyEval_SaveThread();
    }
    ~MaybeUnlocked() {
        if (state_) PyEval_RestoreThread(state_);
    }
    MaybeUnlocked(const MaybeUnlocked&) = delete;
    MaybeUnlocked& operator=(const MaybeUnlocked&) = delete;

private:
    PyThreadState* state_ = nullptr;
};

}  // namespace moestro
